/** What the page knows of the cluster, and how it changes with what it hears. Pure. */

import type {
  ClusterStatus,
  EventStatus,
  Histogram,
  PipelineStatus,
  StageStatus,
  WorkerStatus,
} from './types'

export interface Happening {
  number: number
  kind: string
  level: EventStatus['level']
  text: string
  times: number
  worker: string
  at: number
}

/** A machine that served and is gone: shown for a while where it stood. */
export interface Ghost {
  stage: StageStatus
  worker: WorkerStatus
  lineage: number
  index: number
  at: number
}

export interface Sample {
  at: number
  tokens: number
  rate: number
  firstToken?: Histogram
  betweenTokens?: Histogram
}

export type Connection = 'connecting' | 'live' | 'polling' | 'away'

export interface Live {
  connection: Connection
  trouble: string
  status: ClusterStatus | null
  at: number
  happenings: Happening[]
  ghosts: Ghost[]
  samples: Sample[]
  /** The pipelines that were last told of: what is lost is shown until there are others. */
  before: { pipelines: PipelineStatus[]; at: number }
  /** Number of each machine's colour, by name; kept when a machine leaves. */
  colours: Record<string, number>
}

export const NOTHING: Live = {
  connection: 'connecting',
  trouble: '',
  status: null,
  at: 0,
  happenings: [],
  ghosts: [],
  samples: [],
  before: { pipelines: [], at: 0 },
  colours: {},
}

export type Heard =
  | { kind: 'status'; status: ClusterStatus; at: number; by: 'live' | 'polling' }
  | { kind: 'event'; event: EventStatus; at: number }
  | { kind: 'away'; trouble: string }

export const NUM_COLOURS = 8
const MAX_HAPPENINGS = 200
const MAX_SAMPLES = 120
const GHOST_MS = 30_000
const RATE_MS = 5_000

export function hear(live: Live, heard: Heard): Live {
  switch (heard.kind) {
    case 'away':
      return { ...live, connection: 'away', trouble: heard.trouble }
    case 'event':
      return { ...live, happenings: withEvents(live.happenings, [heard.event], heard.at) }
    case 'status':
      return withStatus(live, heard.status, heard.at, heard.by)
  }
}

function withStatus(live: Live, status: ClusterStatus, at: number, by: 'live' | 'polling'): Live {
  const restarted = live.status !== null && status.tokens_generated < live.status.tokens_generated
  const before = restarted ? { ...live, happenings: [], samples: [], ghosts: [] } : live
  return {
    connection: by,
    trouble: '',
    status,
    at,
    happenings: withEvents(before.happenings, status.events, at),
    ghosts: ghostsAfter(before, status, at),
    samples: withSample(before.samples, status, at),
    before: pipelinesOf(status).length > 0 ? { pipelines: pipelinesOf(status), at } : before.before,
    colours: withColours(live.colours, status),
  }
}

export function withEvents(known: Happening[], events: EventStatus[], at: number): Happening[] {
  const byNumber = new Map(known.map((one) => [one.number, one]))
  for (const event of events) {
    if (byNumber.has(event.number)) continue
    const { number, kind, level, text, times = 1, worker = '' } = event
    byNumber.set(number, { number, kind, level, text, times, worker, at: at - event.age_s * 1000 })
    // What happens again gets a new number: the older line says less.
    if (times > 1) {
      for (const [old, one] of byNumber) if (old < number && one.text === text) byNumber.delete(old)
    }
  }
  return [...byNumber.values()].sort((a, b) => a.number - b.number).slice(-MAX_HAPPENINGS)
}

function ghostsAfter(live: Live, status: ClusterStatus, at: number): Ghost[] {
  const here = new Set(status.workers.map((worker) => worker.name))
  const kept = live.ghosts.filter((one) => !here.has(one.worker.name) && at - one.at < GHOST_MS)
  const known = new Set(kept.map((one) => one.worker.name))
  for (const pipeline of live.status ? pipelinesOf(live.status) : []) {
    pipeline.stages.forEach((stage, index) => {
      const worker = live.status?.workers.find((one) => one.name === stage.worker)
      if (!worker || here.has(stage.worker) || known.has(stage.worker)) return
      known.add(stage.worker)
      kept.push({ stage, worker, lineage: pipeline.lineage, index, at })
    })
  }
  return kept
}

function withSample(samples: Sample[], status: ClusterStatus, at: number): Sample[] {
  const past = samples.find((one) => at - one.at <= RATE_MS)
  const seconds = past ? (at - past.at) / 1000 : 0
  const rate = past && seconds > 0.2 ? (status.tokens_generated - past.tokens) / seconds : 0
  const sample: Sample = {
    at,
    tokens: status.tokens_generated,
    rate: Math.max(0, rate),
    firstToken: status.latencies?.first_token,
    betweenTokens: status.latencies?.between_tokens,
  }
  return [...samples, sample].slice(-MAX_SAMPLES)
}

function withColours(colours: Record<string, number>, status: ClusterStatus) {
  const next = { ...colours }
  const used = Object.values(next)
  const names = pipelinesOf(status).flatMap((one) => one.stages.map((stage) => stage.worker))
  for (const name of [...names, ...status.workers.map((worker) => worker.name)]) {
    if (next[name] !== undefined) continue
    const counts = Array.from({ length: NUM_COLOURS }, (_, i) => used.filter((u) => u === i).length)
    const colour = counts.indexOf(Math.min(...counts))
    next[name] = colour
    used.push(colour)
  }
  return next
}

/** The pipelines to show: between two plans, the last ones, as far as their machines are here. */
export function shownPipelines({ status, before, at }: Live): PipelineStatus[] {
  if (!status) return []
  const told = pipelinesOf(status)
  if (told.length > 0 || status.state === 'serving' || at - before.at > GHOST_MS) return told
  return before.pipelines.map(({ epoch, lineage, stages, links, kv_tokens }) => ({
    epoch,
    lineage,
    state: 'loading',
    stages: stages.map(({ worker, layers }) => ({ worker, layers, ready: false })),
    links,
    kv_tokens,
  }))
}

/** The pipelines; made up from the workers where a server does not tell them. */
export function pipelinesOf(status: ClusterStatus): PipelineStatus[] {
  if (status.pipelines && status.pipelines.length > 0) return oneOfEachLineage(status.pipelines)
  const stages = status.workers
    .filter((worker) => worker.layers !== null && worker.state !== 'unfit')
    .map((worker) => ({
      worker: worker.name,
      layers: worker.layers!,
      ready: worker.state !== 'loading',
      step_s: worker.seconds_per_token,
    }))
    .sort((a, b) => a.layers.start - b.layers.start)
  const consecutive = stages.every((s, i) => s.layers.start === (stages[i - 1]?.layers.stop ?? 0))
  if (stages.length === 0 || !consecutive || status.pipelines?.length === 0) return []
  const state = stages.every((stage) => stage.ready) ? ('serving' as const) : ('loading' as const)
  const links = stages.slice(1).map((stage, i) => ({
    sender: stages[i]!.worker,
    receiver: stage.worker,
    how: status.workers.find((worker) => worker.name === stages[i]!.worker)!.link,
  }))
  const { epoch, kv_tokens, answers_running } = status
  return [{ epoch, lineage: 0, state, stages, links, kv_tokens, answers_running }]
}

/** The pipeline that most answers run on: what is said of one is said of it. */
export function busiest(pipelines: PipelineStatus[]): PipelineStatus | undefined {
  const running = (one: PipelineStatus) => (one.state === 'serving' ? 1 : 0) + (one.answers_running ?? 0)
  return [...pipelines].sort((a, b) => running(b) - running(a))[0]
}

/** While a pipeline is being replaced, both are told: the one that serves is shown. */
function oneOfEachLineage(pipelines: NonNullable<ClusterStatus['pipelines']>) {
  const shown = new Map<number, (typeof pipelines)[number]>()
  for (const one of pipelines) {
    const other = shown.get(one.lineage)
    if (!other || other.state === 'loading') shown.set(one.lineage, one)
  }
  return [...shown.values()]
}
