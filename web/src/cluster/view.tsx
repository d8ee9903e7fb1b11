/** The cluster at a glance: the picture, the reasons, the figures. */

import { lazy, Suspense } from 'react'
import type { Live } from '../api/live'
import { busiest, pipelinesOf } from '../api/live'
import type { Me } from '../api/types'
import * as say from '../parts/format'
import { Events } from './events'
import { Figures } from './figures'
import { Picture, slowedBy } from './picture'
import { news } from './reason'
import { Requests } from './requests'
import { Stages } from './stages'
import { Slowness } from './slowness'

const Admin = lazy(() => import('./admin'))

export function ClusterView({ live, me }: { live: Live; me: Me | null }) {
  const status = live.status
  if (!status) {
    return <p className="quiet centred">{live.connection === 'away' ? '' : 'Looking at the cluster …'}</p>
  }
  const pipelines = pipelinesOf(status)
  const isAdmin = me?.role === 'admin'
  return (
    <div className="cluster">
      <section className="card hero" aria-labelledby="pipeline-title">
        <Headline live={live} />
        <Picture live={live} rate={live.samples.at(-1)?.rate ?? 0} />
        <Legend live={live} />
      </section>
      <Figures live={live} />
      <div className="pair">
        <Slowness status={status} pipelines={pipelines} colours={live.colours} />
        <Events live={live} />
      </div>
      <Stages live={live} isAdmin={isAdmin} />
      <Requests live={live} />
      {isAdmin && (
        <Suspense fallback={null}>
          <Admin live={live} />
        </Suspense>
      )}
    </div>
  )
}

const STATES = { waiting: 'Waiting for machines', loading: 'Loading', serving: 'Serving' }

function Headline({ live }: { live: Live }) {
  const status = live.status!
  const pipelines = pipelinesOf(status)
  const moving = pipelines.some((one) => one.move)
  const said = news(live)
  return (
    <div className="headline">
      <h2 id="pipeline-title">
        <span className={`state ${moving ? 'moving' : status.state}`} />
        {moving ? 'Layers are moving' : STATES[status.state]}
        {pipelines.length > 1 && ` on ${pipelines.length} pipelines`}
      </h2>
      <p className={`news ${said.level}`} aria-live="polite">
        {said.worker && <span className={`swatch paint m${live.colours[said.worker] ?? 0}`} />}
        {said.text}
      </p>
    </div>
  )
}

function Legend({ live }: { live: Live }) {
  const pipeline = busiest(pipelinesOf(live.status!))
  const slowed = pipeline ? slowedBy(pipeline) : null
  return (
    <p className="legend">
      <span className="key">
        <svg width="14" height="14" aria-hidden="true">
          <rect className="ink" x="4" y="0" width="6" height="14" rx="2" />
        </svg>
        one layer
      </span>
      <span className="key">
        <svg width="52" height="8" aria-hidden="true">
          <rect className="free" width="52" height="8" rx="4" />
          <rect className="ink room" width="42" height="8" rx="4" />
          <rect className="ink used" width="34" height="8" rx="4" />
          <rect className="ink" width="24" height="8" rx="4" />
        </svg>
        memory: weights, KV cache, its room, free
      </span>
      {slowed !== null && slowed > 1 && (
        <span className="key">
          <svg width="14" height="14" aria-hidden="true">
            <circle className="halo" cx="7" cy="7" r="7" />
            <circle className="core" cx="7" cy="7" r="3.5" />
          </svg>
          tokens, shown {say.number(slowed)} times slower
        </span>
      )}
    </p>
  )
}
