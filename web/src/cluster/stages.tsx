/** Every machine as a row: what it has, and how long it takes against what was expected. */

import { useState } from 'react'
import { askJson, messageOf } from '../api/http'
import type { Live } from '../api/live'
import { pipelinesOf } from '../api/live'
import type { StageStatus, WorkerStatus } from '../api/types'
import * as say from '../parts/format'

export function Stages({ live, isAdmin }: { live: Live; isAdmin: boolean }) {
  const status = live.status!
  const stages = new Map<string, StageStatus>()
  for (const pipeline of pipelinesOf(status)) {
    for (const stage of pipeline.stages) stages.set(stage.worker, stage)
  }
  const order = [...stages.keys()]
  const rank = (worker: WorkerStatus) => (order.indexOf(worker.name) + order.length + 1) % (order.length + 1)
  const workers = [...status.workers].sort((a, b) => rank(a) - rank(b))
  const most = Math.max(
    1e-9,
    ...[...stages.values()].map((stage) => Math.max(stage.step_s ?? 0, stage.predicted_s ?? 0)),
  )
  return (
    <section className="card" aria-labelledby="machines-title">
      <h2 id="machines-title">Machines</h2>
      {workers.length === 0 && <p className="quiet">None has joined yet.</p>}
      {workers.length > 0 && (
        <div className="scroll" tabIndex={0} role="group" aria-labelledby="machines-title">
          <table>
            <thead>
              <tr>
                <th scope="col">Machine</th>
                <th scope="col">Layers</th>
                <th scope="col">A step: measured, and predicted</th>
                <th scope="col" className="right">
                  Weights
                </th>
                <th scope="col" className="right">
                  KV cache
                </th>
                <th scope="col">What it is good for</th>
                {isAdmin && <td />}
              </tr>
            </thead>
            <tbody>
              {workers.map((worker) => (
                <Row
                  key={worker.name}
                  worker={worker}
                  stage={stages.get(worker.name) ?? null}
                  colour={live.colours[worker.name] ?? 0}
                  most={most}
                  encoderLayers={live.status?.encoder_layers}
                  isAdmin={isAdmin}
                />
              ))}
            </tbody>
          </table>
        </div>
      )}
    </section>
  )
}

interface RowProps {
  worker: WorkerStatus
  stage: StageStatus | null
  colour: number
  most: number
  encoderLayers?: number
  isAdmin: boolean
}

function Row({ worker, stage, colour, most, encoderLayers, isAdmin }: RowProps) {
  const { device_name, device, threads } = worker.capabilities
  return (
    <tr>
      <th scope="row">
        <span className={`swatch fill m${colour}`} />
        {worker.name}
        <span className="under">
          {device_name || device}
          {device === 'cpu' && `, ${say.count(threads, 'thread')}`}
        </span>
      </th>
      <td>
        {worker.layers ? say.layers(worker.layers, encoderLayers) : '–'}
        {worker.next_layers && ` → ${say.layers(worker.next_layers, encoderLayers)}`}
        {worker.state !== 'serving' && <span className="under">{worker.state}</span>}
      </td>
      <td className="steps">
        <Step seconds={stage?.step_s} most={most} paint={`m${colour}`} />
        <Step seconds={stage?.predicted_s} most={most} paint="predicted" />
      </td>
      <td className="right">{say.bytes(worker.weight_bytes)}</td>
      <td className="right">{say.bytes(worker.kv_used_bytes ?? worker.kv_bytes)}</td>
      <td className="advice">{worker.note || worker.advice || '–'}</td>
      {isAdmin && (
        <td className="right">
          <Drain worker={worker} />
        </td>
      )}
    </tr>
  )
}

function Step(props: { seconds: number | null | undefined; most: number; paint: string }) {
  const { seconds, most, paint } = props
  return (
    <span className="step">
      <span
        className={seconds == null ? '' : `fill ${paint}`}
        style={{ width: `${((seconds ?? 0) / most) * 100}%` }}
      />
      <span className="number">{say.seconds(seconds)}</span>
    </span>
  )
}

function Drain({ worker }: { worker: WorkerStatus }) {
  const [state, setState] = useState<'no' | 'sure' | 'asked'>('no')
  const [trouble, setTrouble] = useState('')
  const drain = async () => {
    setState('asked')
    try {
      await askJson(`/api/v1/workers/${encodeURIComponent(worker.name)}/drain`, { method: 'POST' })
    } catch (error) {
      setTrouble(messageOf(error))
      setState('no')
    }
  }
  if (worker.state === 'leaving' || state === 'asked') return <span className="under">leaving …</span>
  return (
    <>
      {state === 'no' && (
        <button onClick={() => setState('sure')} aria-label={`Drain ${worker.name}`}>
          Drain
        </button>
      )}
      {state === 'sure' && (
        <span className="buttons">
          <button className="danger" autoFocus onClick={drain}>
            Let it leave
          </button>
          <button onClick={() => setState('no')}>No</button>
        </span>
      )}
      {trouble && (
        <span className="trouble" role="alert">
          {trouble}
        </span>
      )}
    </>
  )
}
