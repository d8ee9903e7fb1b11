import { describe, expect, it } from 'vitest'
import { cluster, event, pipeline, worker } from '../test-cluster'
import { hear, type Live, NOTHING, pipelinesOf } from './live'
import type { ClusterStatus } from './types'

const A = worker('a', 0, 4)
const B = worker('b', 4, 8)
const C = worker('c')

function heard(...statuses: ClusterStatus[]): Live {
  return statuses.reduce(
    (live, status, i) => hear(live, { kind: 'status', status, at: 1000 * (i + 1), by: 'live' }),
    NOTHING,
  )
}

describe('what is known of the cluster', () => {
  it('keeps a machine that died where it stood, until it is back or forgotten', () => {
    const after = cluster([A, worker('c', 4, 8)])
    const live = heard(cluster([A, B, C]), after)
    expect(live.ghosts.map((one) => [one.worker.name, one.index])).toEqual([['b', 1]])
    expect(heard(cluster([A, B, C]), after, cluster([A, B, C])).ghosts).toEqual([])
    const later = hear(live, { kind: 'status', status: after, at: 40_000, by: 'live' })
    expect(later.ghosts).toEqual([])
  })

  it('gives each machine a colour that it keeps, and different ones while there are some', () => {
    const first = heard(cluster([A, B, C]))
    expect(first.colours).toEqual({ a: 0, b: 1, c: 2 })
    const many = Array.from({ length: 20 }, (_, i) => worker(`w${i}`))
    const live = hear(first, { kind: 'status', status: cluster([B, ...many]), at: 2000, by: 'live' })
    expect(live.colours).toMatchObject({ a: 0, b: 1, c: 2, w0: 3 })
    const used = Object.values(live.colours)
    for (let colour = 0; colour < 8; colour++) {
      expect(used.filter((one) => one === colour).length).toBeGreaterThanOrEqual(2)
    }
  })

  it('tells every event once, and one that happens again only as it was last', () => {
    const again = event(3, 'hm', { times: 2 })
    let live = heard(cluster([A], { events: [event(1, 'hm'), event(2, 'other')] }))
    live = hear(live, { kind: 'event', event: again, at: 2000 })
    live = hear(live, { kind: 'event', event: again, at: 2000 })
    expect(live.happenings.map((one) => [one.number, one.times])).toEqual([
      [2, 1],
      [3, 2],
    ])
  })

  it('is bounded', () => {
    const statuses = Array.from({ length: 300 }, (_, i) =>
      cluster([A], { events: [event(i + 1, `event ${i}`)], tokens_generated: 100 + i }),
    )
    const live = heard(...statuses)
    expect(live.happenings.length).toBe(200)
    expect(live.happenings.at(-1)!.number).toBe(300)
    expect(live.samples.length).toBe(120)
  })

  it('measures tokens per second, and begins anew with a coordinator that did', () => {
    const at = (tokens_generated: number) => cluster([A], { tokens_generated })
    expect(heard(at(100), at(120), at(140)).samples.at(-1)!.rate).toBe(20)
    const restarted = heard(at(100), at(120), at(5))
    expect(restarted.samples.map((one) => one.rate)).toEqual([0])
  })

  it('stays on the screen while nobody answers', () => {
    const live = hear(heard(cluster([A])), { kind: 'away', trouble: 'no route' })
    expect(live).toMatchObject({ connection: 'away', trouble: 'no route' })
    expect(live.status).not.toBeNull()
    const back = hear(live, { kind: 'status', status: cluster([A]), at: 9000, by: 'polling' })
    expect(back).toMatchObject({ connection: 'polling', trouble: '' })
  })
})

describe('pipelines', () => {
  it('are made up of workers where a server tells none', () => {
    const made = pipelinesOf({ ...cluster([B, A, C]), pipelines: undefined })
    expect(made[0]!.stages.map((stage) => stage.worker)).toEqual(['a', 'b'])
    expect(made[0]!.links.map((link) => [link.sender, link.receiver])).toEqual([['a', 'b']])
    expect(pipelinesOf({ ...cluster([B]), pipelines: undefined })).toEqual([])
  })

  it('are shown once while one replaces another', () => {
    const serving = pipeline([A, B])
    const loading = pipeline([A, C], { epoch: 2, state: 'loading' })
    expect(pipelinesOf(cluster([A, B], { pipelines: [serving, loading] }))).toEqual([serving])
    expect(pipelinesOf(cluster([A, B], { pipelines: [loading, serving] }))).toEqual([serving])
  })
})
