/** What is said beside the picture when it changes. Pure. */

import type { Happening, Live } from '../api/live'
import { pipelinesOf } from '../api/live'
import type { HeldLayers } from '../api/types'
import { count, layers, seconds } from '../parts/format'

const NEWS_MS = 20_000
const TOGETHER_MS = 10_000
const WHERE_TO = new Set(['plan_loading', 'move_committed'])

export interface News {
  level: Happening['level']
  worker: string
  text: string
}

/** Returns why a machine is gone, as far as the cluster told; `left` if it said goodbye. */
export function reasonOf(live: Live, worker: string): { text: string; left: boolean } {
  const told = live.happenings.filter((one) => one.worker === worker)
  const last = told.at(-1)
  if (last?.kind === 'worker_left') return { text: last.text, left: true }
  const bad = told.filter((one) => one.level !== 'info')
  return { text: (bad.at(-1) ?? last)?.text ?? 'gone; the cluster told no reason', left: false }
}

/** Returns what stands beside the picture: a move under way, what just happened, or how it is. */
export function news(live: Live): News {
  const status = live.status
  if (!status) return { level: 'info', worker: '', text: 'Waiting for the first picture …' }
  const pipelines = pipelinesOf(status)
  for (const { move } of pipelines) {
    if (!move) continue
    const gaining = move.after.filter(
      (held) => !move.before.some((was) => was.worker === held.worker && holds(was, held)),
    )
    const moved = gaining.map((held) => `${held.worker} gets ${layers(held.layers, status.encoder_layers)}`)
    const text = `${moved.join(', ')} (${move.phase}). Why: ${move.why}`
    return { level: 'info', worker: gaining[0]?.worker ?? '', text }
  }
  const recent = live.happenings.filter((one) => live.at - one.at < NEWS_MS)
  const worst = recent.filter((one) => one.level !== 'info').at(-1) ?? recent.at(-1)
  if (worst) {
    // Where a machine's layers went is told by another event, before or after it.
    const plan = recent
      .filter((one) => WHERE_TO.has(one.kind) && Math.abs(one.at - worst.at) < TOGETHER_MS)
      .at(-1)
    const text = plan && plan !== worst ? `${worst.text}; ${plan.text}` : worst.text
    return { level: worst.level, worker: worst.worker, text }
  }
  if (status.note && status.state !== 'serving') {
    return { level: 'warning', worker: '', text: status.note }
  }
  const machines = new Set(pipelines.flatMap((one) => one.stages.map((stage) => stage.worker)))
  const stall = status.moves > 0 && status.move_stall_s > 0 ? `, the latest with a standstill of ${seconds(status.move_stall_s)}` : ''
  const moves = status.moves > 0 ? ` Layers have moved ${count(status.moves, 'time')}${stall}.` : ''
  return {
    level: 'info',
    worker: '',
    text: `${count(status.num_layers, 'layer')} on ${count(machines.size, 'machine')}; plan ${status.epoch}.${moves}`,
  }
}

const holds = (a: HeldLayers, b: HeldLayers) =>
  a.layers.start <= b.layers.start && a.layers.stop >= b.layers.stop
