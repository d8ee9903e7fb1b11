/** Why the cluster is as slow as it is: where the time of a token goes, and what would help. Pure. */

import type { ClusterStatus, PipelineStatus } from '../api/types'
import { count, layers, percent, rate, seconds } from '../parts/format'

export interface Part {
  what: string
  kind: 'compute' | 'waiting' | 'network'
  worker: string
  seconds: number
}

export interface Finding {
  title: string
  text: string
}

export interface Why {
  round_trip_s: number
  parts: Part[]
  findings: Finding[]
}

/** Returns where the time of a step goes; null until some steps were measured. */
export function why(status: ClusterStatus, pipeline: PipelineStatus): Why | null {
  const { stages } = pipeline
  if (stages.some((stage) => stage.step_s === null || stage.step_s === undefined)) return null
  const parts: Part[] = stages.map((stage) => ({
    what: `computing layers ${layers(stage.layers, status.encoder_layers)}`,
    kind: 'compute',
    worker: stage.worker,
    seconds: stage.step_s!,
  }))
  const queued = stages.reduce((sum, stage) => sum + (stage.queued_s ?? 0), 0)
  if (queued > 0) parts.push({ what: 'waiting for a machine', kind: 'waiting', worker: '', seconds: queued })
  const outside = pipeline.outside_s ?? 0
  if (outside > 0) parts.push({ what: 'on the network', kind: 'network', worker: '', seconds: outside })
  const total = parts.reduce((sum, part) => sum + part.seconds, 0)
  if (total <= 0) return null
  const shares = { compute: 0, waiting: 0, network: 0 }
  for (const part of parts) shares[part.kind] += part.seconds / total
  const findings = [
    balance(pipeline, shares),
    ...slowest(pipeline),
    ...idle(status, pipeline),
    ...full(status, pipeline),
    ...better(status, pipeline),
    ...another(status, pipeline, shares),
  ]
  return { round_trip_s: total, parts, findings }
}

type Shares = Record<Part['kind'], number>

function balance(pipeline: PipelineStatus, shares: Shares): Finding {
  if (pipeline.stages.length === 1) {
    return { title: 'One machine does it all', text: 'No token crosses a network between stages.' }
  }
  if (shares.network > 0.5) {
    return {
      title: `The network takes ${percent(shares.network)} of a token's time`,
      text: 'A cable instead of Wi-Fi, or fewer machines, would help most.',
    }
  }
  if (shares.waiting > 0.4) {
    return {
      title: `Tokens wait for busy machines ${percent(shares.waiting)} of their time`,
      text: 'Many answers share the pipeline: each is slower, all together are faster.',
    }
  }
  return {
    title: `Computing takes ${percent(shares.compute)} of a token's time`,
    text: `The network takes ${percent(shares.network)}.`,
  }
}

function slowest(pipeline: PipelineStatus): Finding[] {
  const { stages } = pipeline
  if (stages.length < 2) return []
  const times = stages.map((stage) => stage.step_s!)
  const at = pipeline.slowest ?? times.indexOf(Math.max(...times))
  const stage = stages[at]
  if (!stage) return []
  const others = (times.reduce((a, b) => a + b, 0) - times[at]!) / (times.length - 1)
  const ratio = others > 0 ? times[at]! / others : 1
  if (ratio < 1.15) {
    return [{ title: 'The stages are even', text: 'No machine holds the others up.' }]
  }
  return [
    {
      title: `${stage.worker} is the slowest stage`,
      text: `${seconds(times[at])} a step, ${rate(ratio)} times the mean of the others: no more than ${rate((pipeline.step_tokens ?? 1) / times[at]!)} tokens/s can pass it.`,
    },
  ]
}

function idle(status: ClusterStatus, pipeline: PipelineStatus): Finding[] {
  const bubble = pipeline.bubble_ratio ?? 0
  if (bubble < 0.4 || pipeline.stages.length < 2 || status.answers_waiting > 0) return []
  const running = pipeline.answers_running ?? 0
  const forecast = pipeline.forecast
  const more = forecast
    ? ` With more answers at once ${rate(forecast.full_tokens_per_s)} tokens/s are expected, instead of ${rate(forecast.alone_tokens_per_s)} for one.`
    : ''
  return [
    {
      title: `Machines are idle ${percent(bubble)} of the time`,
      text: `${count(running, 'answer')} cannot keep ${count(pipeline.stages.length, 'stage')} busy.${more}`,
    },
  ]
}

function full(status: ClusterStatus, pipeline: PipelineStatus): Finding[] {
  const taken = (pipeline.kv_tokens_used ?? 0) / Math.max(1, pipeline.kv_tokens)
  if (status.answers_waiting === 0 || taken < 0.8) return []
  return [
    {
      title: `${count(status.answers_waiting, 'answer')} wait for memory`,
      text: `The KV cache is ${percent(taken)} full: a machine with more memory would help.`,
    },
  ]
}

function better(status: ClusterStatus, pipeline: PipelineStatus): Finding[] {
  const forecast = pipeline.forecast
  const gain = forecast?.better_tokens_per_s
  if (!forecast || !gain || gain < forecast.tokens_per_s * 1.02) return []
  const text = (forecast.better ?? [])
    .map((held) => `${held.worker} ${layers(held.layers, status.encoder_layers)}`)
    .join(', ')
  return [
    {
      title: `A better split is known: ${rate(forecast.tokens_per_s)} → ${rate(gain)} tokens/s`,
      text: text ? `${text}. Layers move when that is worth the standstill.` : '',
    },
  ]
}

function another(status: ClusterStatus, pipeline: PipelineStatus, shares: Shares): Finding[] {
  const burden = status.workers.find((worker) => (worker.gain ?? 0) < -0.02 && worker.layers)
  if (burden) {
    return [{ title: `Without ${burden.name} it would be faster`, text: burden.advice }]
  }
  const helper = status.workers.find((worker) => !worker.layers && (worker.gain ?? 0) > 0.02)
  if (helper) return [{ title: `${helper.name} would help`, text: helper.advice }]
  if (shares.network > 0.5) {
    return [
      {
        title: 'Another machine would not help one answer',
        text: 'It adds a hop, and hops are what takes the time. For many answers at once it may.',
      },
    ]
  }
  const compute = pipeline.stages.map((stage) => stage.step_s!)
  const mean = compute.reduce((a, b) => a + b, 0) / compute.length
  const fewer = compute.length / (compute.length + 1)
  return [
    {
      title: 'Another machine would help many answers at once',
      text: `One like these would take its share of the layers: stages of about ${seconds(mean * fewer)} instead of ${seconds(mean)}. A single answer would not be faster, for its tokens pass one machine after the other.`,
    },
  ]
}
