/** The pipeline as a picture: it slides to its new place whenever the cluster changes. */

import { useEffect, useMemo, useRef, useState } from 'react'
import type { Live } from '../api/live'
import type { PipelineStatus, WorkerStatus } from '../api/types'
import * as say from '../parts/format'
import { useReducedMotion } from '../parts/motion'
import { type Box, layOut, PAD, type Picture as Laid, type Row, type Wire } from './layout'
import { reasonOf } from './reason'

export function Picture({ live, rate }: { live: Live; rate: number }) {
  const [frame, width] = useWidth()
  const picture = useMemo(() => layOut(live, width), [live, width])
  return (
    <div className="picture" ref={frame}>
      {width > 0 && picture.height > 0 && (
        <svg
          width={width}
          height={picture.height}
          viewBox={`0 0 ${width} ${picture.height}`}
          role="img"
          aria-label={inWords(picture, live.status?.encoder_layers)}
        >
          {picture.rows.map((row) => (
            <Wires key={row.key} row={row} live={live} rate={picture.rows.length > 1 ? 0 : rate} />
          ))}
          {picture.boxes.filter(isInTheWay).map((box) => (
            <MachineBox key={box.key} box={box} live={live} tall={picture.tall} />
          ))}
          {picture.bars.map((bar) => (
            <g
              key={bar.key}
              className="bar"
              style={{
                transform: `translate(${bar.x}px, ${bar.y}px)`,
                transitionDelay: `${(bar.layer % 16) * 18}ms`,
              }}
            >
              <rect
                className={`paint m${bar.colour} ${bar.ready ? '' : 'loading'}`}
                style={{ width: bar.width, height: bar.next === null ? bar.height : bar.height / 2 - 1 }}
                rx={Math.min(3, bar.width / 3)}
              />
              {bar.next !== null && (
                <rect
                  className={`paint m${bar.next} arriving`}
                  y={bar.height / 2 + 1}
                  style={{ width: bar.width, height: bar.height / 2 - 1 }}
                  rx={Math.min(3, bar.width / 3)}
                />
              )}
            </g>
          ))}
          {picture.rows.map((row) => (
            <Tokens key={row.key} row={row} />
          ))}
          {picture.boxes.filter((box) => !isInTheWay(box)).map((box) => (
            <MachineBox key={box.key} box={box} live={live} tall={picture.tall} />
          ))}
        </svg>
      )}
    </div>
  )
}

/** Tokens go over a machine that computes, and behind one that is gone. */
const isInTheWay = (box: Box) => box.kind !== 'gone' || box.stage !== null

function useWidth() {
  const frame = useRef<HTMLDivElement>(null)
  const [width, setWidth] = useState(0)
  useEffect(() => {
    const observer = new ResizeObserver((entries) => {
      setWidth(Math.floor(entries[0]?.contentRect.width ?? 0))
    })
    if (frame.current) observer.observe(frame.current)
    return () => observer.disconnect()
  }, [])
  return [frame, width] as const
}

function inWords(picture: Laid, encoderLayers?: number): string {
  const rows = picture.rows.map(({ pipeline }) =>
    pipeline.stages.map((s) => `${s.worker} with layers ${say.layers(s.layers, encoderLayers)}`).join(', then '),
  )
  const idle = picture.boxes.filter((box) => box.kind === 'idle').map((box) => box.name)
  const gone = picture.boxes.filter((box) => box.kind === 'gone').map((box) => box.name)
  return [
    rows.length > 0 ? `Pipeline: ${rows.join('; ')}.` : 'No pipeline.',
    idle.length > 0 ? `Without layers: ${idle.join(', ')}.` : '',
    gone.length > 0 ? `Gone: ${gone.join(', ')}.` : '',
  ].join(' ')
}

function Wires({ row, live, rate }: { row: Row; live: Live; rate: number }) {
  const { coordinator, pipeline } = row
  const wide = coordinator.height > 60
  const waiting = live.status?.answers_waiting ?? 0
  const running = pipeline.answers_running ?? 0
  const middle = coordinator.x + coordinator.width / 2
  return (
    <g>
      <path className="wire back" d={row.back} />
      {wide && (
        <g className="backlabel" style={{ transform: `translate(${row.backLabel.x}px, ${row.backLabel.y}px)` }}>
          <rect x={-92} y={-10} width={184} height={20} className="ground" />
          <text textAnchor="middle" dy={4}>
            {rate > 0 ? `${say.rate(rate)} tokens/s back to the coordinator` : 'back to the coordinator'}
          </text>
        </g>
      )}
      {row.wires.map((wire) => (
        <WireLine key={wire.key} wire={wire} />
      ))}
      <g className="head">
        <rect
          x={coordinator.x + 0.5}
          y={coordinator.y}
          width={coordinator.width - 1}
          height={coordinator.height}
          rx={10}
        />
        {wide ? (
          <>
            <text className="title" x={middle} y={coordinator.y + 24} textAnchor="middle">
              {row.title}
            </text>
            <text className="figure" x={middle} y={coordinator.y + 50} textAnchor="middle">
              {running}
            </text>
            <text x={middle} y={coordinator.y + 68} textAnchor="middle">
              running{waiting > 0 ? ` · ${waiting} wait` : ''}
            </text>
          </>
        ) : (
          <>
            <text className="title" x={PAD} y={coordinator.y + 31}>
              {row.title}
            </text>
            <text x={coordinator.width - PAD} y={coordinator.y + 31} textAnchor="end">
              {running} running · {waiting} waiting
            </text>
          </>
        )}
      </g>
    </g>
  )
}

function WireLine({ wire }: { wire: Wire }) {
  const { link, label } = wire
  const latency = link?.latency_s != null ? say.seconds(link.latency_s) : ''
  const speed = link?.bytes_per_s != null ? say.perSecond(link.bytes_per_s) : ''
  return (
    <g>
      <path className={`wire ${link?.how === 'relayed' ? 'relayed' : ''}`} d={wire.path} />
      {link && !label.vertical && (
        <g className="wirelabel" style={{ transform: `translate(${label.x}px, ${label.y}px)` }}>
          <text className="strong" textAnchor="middle" y={-10}>
            {latency}
          </text>
          <text textAnchor="middle" y={20}>
            {speed}
          </text>
          {link.how === 'relayed' && (
            <text textAnchor="middle" y={35}>
              relayed
            </text>
          )}
        </g>
      )}
      {link && label.vertical && (
        <text className="wirelabel" x={label.x} y={label.y + 4}>
          <tspan className="strong">{latency}</tspan> {speed && `· ${speed}`}
          {link.how === 'relayed' && ' · relayed'}
        </text>
      )}
    </g>
  )
}

function MachineBox({ box, live, tall }: { box: Box; live: Live; tall: boolean }) {
  const { worker, stage } = box
  const inner = box.width - 2 * PAD
  const chars = Math.max(6, Math.floor((inner - (box.slowest ? 52 : 0)) / 8))
  const foot = box.height - 40
  const reason = box.kind === 'gone' ? reasonOf(live, box.name) : null
  // A machine that is gone still has its layers until others get them.
  const noteTop = stage ? box.height - 58 : 34
  return (
    <g
      className={`machine ${reason?.left ? 'left' : ''} ${box.kind} ${stage && !stage.ready ? 'loading' : ''}`}
      style={{ transform: `translate(${box.x}px, ${box.y}px)` }}
    >
      <rect className="body" style={{ width: box.width, height: box.height }} rx={12} />
      <rect className={`edge paint m${box.colour}`} style={{ width: 26, height: 3 }} x={PAD} rx={1.5} />
      <text className="title" x={PAD} y={27}>
        {say.short(box.name, chars)}
        <title>{box.name}</title>
      </text>
      {box.slowest && (
        <text className="tag" x={box.width - PAD} y={27} textAnchor="end">
          slowest
        </text>
      )}
      {stage && box.kind === 'stage' && (
        <>
          <text x={PAD} y={44}>
            {stageLine(box, live.status?.encoder_layers)}
          </text>
          <Memory worker={worker} colour={box.colour} x={PAD} y={foot} width={inner} />
          <text x={PAD} y={box.height - 14}>
            {worker && say.bytes(worker.memory_used_bytes)}
            {worker && inner > 150 && ` of ${say.bytes(worker.capabilities.memory_bytes)}`}
          </text>
          <text className="strong" x={box.width - PAD} y={box.height - 14} textAnchor="end">
            {stage.step_s != null ? say.seconds(stage.step_s) : ''}
          </text>
        </>
      )}
      {box.kind !== 'stage' && (
        <foreignObject x={PAD} y={noteTop} width={inner} height={box.height - noteTop - 6}>
          <p className={tall || stage || box.kind === 'idle' ? 'note' : 'note tallnote'}>
            {reason ? reason.text : idleNote(worker, live.status?.encoder_layers)}
          </p>
        </foreignObject>
      )}
    </g>
  )
}

function stageLine({ stage, worker }: Box, encoderLayers = 0): string {
  if (!stage) return ''
  const held = stage.layers.stop - stage.layers.start
  const numbers = say.layers(stage.layers, encoderLayers)
  const which = encoderLayers > 0 ? numbers : `layer${held === 1 ? '' : 's'} ${numbers}`
  const fetch = worker?.fetch
  if (!stage.ready && fetch && fetch.total_bytes > 0) {
    return `${which} · ${say.percent(fetch.here_bytes / fetch.total_bytes)} here`
  }
  return stage.ready ? which : `${which} · loading`
}

function idleNote(worker: WorkerStatus | null, encoderLayers?: number): string {
  if (!worker) return ''
  if (worker.next_layers) return `loads layers ${say.layers(worker.next_layers, encoderLayers)}, to serve them`
  const fetch = worker.fetch
  if (fetch && fetch.total_bytes > fetch.here_bytes) {
    return `fetching weights: ${say.percent(fetch.here_bytes / fetch.total_bytes)} of ${say.bytes(fetch.total_bytes)}`
  }
  return worker.note || worker.advice || (worker.state === 'idle' ? 'ready, without layers' : worker.state)
}

function Memory(props: {
  worker: WorkerStatus | null
  colour: number
  x: number
  y: number
  width: number
}) {
  const { worker, colour, x, y, width } = props
  if (!worker || worker.capabilities.memory_bytes <= 0) return null
  const scale = width / worker.capabilities.memory_bytes
  const weights = Math.min(width, worker.weight_bytes * scale)
  const used = Math.min(width - weights, (worker.kv_used_bytes ?? worker.kv_bytes) * scale)
  const room = Math.min(width - weights, Math.max(worker.kv_bytes, worker.kv_room_bytes ?? 0) * scale)
  return (
    <g className="memory">
      <title>
        {`weights ${say.bytes(worker.weight_bytes)}, KV cache ${say.bytes(worker.kv_used_bytes ?? worker.kv_bytes)} used`}
      </title>
      <rect className="free" x={x} y={y} style={{ width, height: 8 }} rx={4} />
      <rect className={`paint m${colour} room`} x={x} y={y} style={{ width: weights + room, height: 8 }} rx={4} />
      <rect className={`paint m${colour} used`} x={x} y={y} style={{ width: weights + used, height: 8 }} rx={4} />
      <rect className={`paint m${colour}`} x={x} y={y} style={{ width: weights, height: 8 }} rx={4} />
    </g>
  )
}

const SECONDS_PER_STAGE = 0.9

/** How many times slower than they are tokens are shown to go. */
export function slowedBy({ round_trip_s, stages }: PipelineStatus): number | null {
  if (!round_trip_s) return null
  return Math.max(1, Math.round((SECONDS_PER_STAGE * (stages.length + 1)) / round_trip_s))
}

function Tokens({ row }: { row: Row }) {
  const still = useReducedMotion()
  const { pipeline } = row
  const flowing =
    pipeline.state === 'serving' &&
    ((pipeline.steps_in_flight ?? 0) > 0 || (pipeline.answers_running ?? 0) > 0)
  if (!flowing || still) return null
  const dots = Math.min(5, Math.max(1, pipeline.steps_in_flight ?? 1))
  const seconds = SECONDS_PER_STAGE * (pipeline.stages.length + 1)
  return (
    <g aria-hidden="true">
      {Array.from({ length: dots }, (_, i) => (
        <g className="token" key={`${i}/${dots}`}>
          <circle className="halo" r={10} />
          <circle className="core" r={4.5} />
          <animateMotion
            dur={`${seconds}s`}
            begin={`${(-seconds * i) / dots}s`}
            repeatCount="indefinite"
            path={row.way}
          />
        </g>
      ))}
    </g>
  )
}
