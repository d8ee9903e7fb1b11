/** The way of every token of one answer, station by station. Pure. */

import type { Candidate, Piece } from '../api/generate'
import { pipelinesOf } from '../api/live'
import type { ClusterStatus, Hop, LayerRange } from '../api/types'

export interface Station {
  worker: string
  layers: LayerRange | null
  shape: number[]
  dtype: string
  compute_s: number | null
  queued_s: number | null
  /** What came in, and how long that was on its way. */
  bytes: number | null
  link_s: number | null
}

export interface Walked {
  token: string
  candidates: Candidate[]
  stations: Station[]
  /** Tokens that passed together. */
  tokens: number
}

export interface Walk {
  prompt: { text: string; id: number | null }[]
  walked: Walked[]
  /** Whether times and shapes are of this very answer, or means of the cluster. */
  traced: boolean
}

export const NO_WALK: Walk = { prompt: [], walked: [], traced: false }

export function withPiece(walk: Walk, piece: Piece, status: ClusterStatus | null): Walk {
  if (!piece.text && piece.scored.length === 0) return walk
  const traced = piece.hops.length > 0
  const scored = piece.scored.length > 0 ? piece.scored : [{ token: piece.text, candidates: [] }]
  const passes = passesOf(piece.hops)
  const added = scored.map((one, i): Walked => {
    const tokens = walk.walked.length + i === 0 ? Math.max(1, walk.prompt.length) : 1
    const passed = traced ? (passes.at(i - scored.length) ?? []) : status ? hopsOf(status) : []
    const told = passed.find((hop) => hop.tokens !== undefined)?.tokens
    return {
      token: one.token,
      candidates: one.candidates,
      tokens: told ?? tokens,
      stations: passed.map((hop) => stationOf(hop, told ?? tokens)),
    }
  })
  return { ...walk, walked: [...walk.walked, ...added], traced: walk.traced || traced }
}

/** Passes through all stages: a token has its own, and those before are parts of the prompt. */
function passesOf(hops: Hop[]): Hop[][] {
  const passes: Hop[][] = []
  for (const [i, hop] of hops.entries()) {
    const start = hop.layers?.start ?? 0
    if (i === 0 || start <= (hops[i - 1]?.layers?.start ?? 0)) passes.push([])
    passes.at(-1)!.push(hop)
  }
  return passes
}

function stationOf(hop: Hop, tokens: number): Station {
  return {
    worker: hop.worker,
    layers: hop.layers ?? null,
    shape: hop.shape ?? [tokens],
    dtype: hop.dtype ?? '',
    compute_s: hop.compute_s ?? null,
    queued_s: hop.queued_s ?? null,
    bytes: hop.bytes ?? null,
    link_s: hop.link_s ?? null,
  }
}

function hopsOf(status: ClusterStatus): Hop[] {
  const pipeline = pipelinesOf(status)[0]
  return (pipeline?.stages ?? []).map((stage, i) => ({
    worker: stage.worker,
    layers: stage.layers,
    compute_s: stage.step_s ?? undefined,
    queued_s: stage.queued_s ?? undefined,
    link_s: pipeline?.links[i - 1]?.latency_s ?? undefined,
  }))
}

/** The stations that a token would pass. */
export function preview(status: ClusterStatus): Walk {
  const stations = hopsOf(status).map((hop) => stationOf(hop, 1))
  return { ...NO_WALK, walked: [{ token: '', candidates: [], stations, tokens: 1 }] }
}

/** What a station is in the kitchen. */
export function chef(index: number, count: number): string {
  if (count === 1) return 'the only chef'
  if (index === 0) return 'prep chef'
  return index === count - 1 ? 'finishing chef' : 'line chef'
}

/** "6 × 5,120": what a tensor's shape is, for people. */
export function shapeText(shape: number[]): string {
  return shape.map((size) => size.toLocaleString('en')).join(' × ')
}

/** A token as it can be seen: spaces and line ends have no shape of their own. */
export function visible(token: string): string {
  return token.replaceAll(' ', '·').replaceAll('\n', '↵').replaceAll('\t', '⇥') || '∅'
}
