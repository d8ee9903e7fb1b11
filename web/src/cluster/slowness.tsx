import { busiest } from '../api/live'
import type { ClusterStatus, PipelineStatus } from '../api/types'
import * as say from '../parts/format'
import { type Part, why } from './why'

interface Props {
  status: ClusterStatus
  pipelines: PipelineStatus[]
  colours: Record<string, number>
}

export function Slowness({ status, pipelines, colours }: Props) {
  const pipeline = busiest(pipelines)
  const found = pipeline ? why(status, pipeline) : null
  return (
    <section className="card" aria-labelledby="why-title">
      <h2 id="why-title">Why is it slow?</h2>
      {!found && <p className="quiet">Nothing was measured with these stages yet: ask for an answer.</p>}
      {found && (
        <>
          <p className="lead">
            One step takes <strong>{say.seconds(found.round_trip_s)}</strong> from the coordinator and back.
          </p>
          <Split parts={found.parts} total={found.round_trip_s} colours={colours} />
          <dl className="findings">
            {found.findings.map((finding) => (
              <div key={finding.title}>
                <dt>{finding.title}</dt>
                <dd>{finding.text}</dd>
              </div>
            ))}
          </dl>
        </>
      )}
    </section>
  )
}

function paint(part: Part, colours: Record<string, number>): string {
  return part.kind === 'compute' ? `m${colours[part.worker] ?? 0}` : part.kind
}

function Split(props: { parts: Part[]; total: number; colours: Record<string, number> }) {
  const { parts, total, colours } = props
  return (
    <>
      <div className="split" aria-hidden="true">
        {parts.map((part) => (
          <span
            key={part.worker + part.kind}
            className={`fill ${paint(part, colours)}`}
            style={{ flexGrow: part.seconds / total }}
          />
        ))}
      </div>
      <ul className="splitkey">
        {parts.map((part) => (
          <li key={part.worker + part.kind}>
            <span className={`swatch fill ${paint(part, colours)}`} />
            <span className="what">
              {part.worker && <strong>{part.worker}</strong>} {part.what}
            </span>
            <span className="number">{say.seconds(part.seconds)}</span>
          </li>
        ))}
      </ul>
    </>
  )
}
