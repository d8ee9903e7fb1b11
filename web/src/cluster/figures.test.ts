import { describe, expect, it } from 'vitest'
import { hear, NOTHING } from '../api/live'
import * as say from '../parts/format'
import { cluster, event, pipeline, worker } from '../test-cluster'
import { quantile, recent, room, since } from './measures'
import { news, reasonOf } from './reason'
import { why } from './why'

const times = (...counts: number[]) => ({ bounds_s: [1, 2, 4], counts, sum_s: 0 })

describe('times', () => {
  it('are estimated within their bucket', () => {
    expect(quantile(times(0, 10, 0, 0), 0.5)).toBe(1.5)
    expect(quantile(times(5, 0, 5, 0), 0.5)).toBe(1)
    expect(quantile(times(5, 0, 5, 0), 0.99)).toBeCloseTo(3.96)
    expect(quantile(times(0, 0, 0, 3), 0.5)).toBe(4)
    expect(quantile(times(0, 0, 0, 0), 0.5)).toBeNull()
    expect(quantile(undefined, 0.5)).toBeNull()
  })

  it('are those of the last minute if there were enough', () => {
    const sample = (at: number, betweenTokens: ReturnType<typeof times>) => ({ at, tokens: 0, rate: 0, betweenTokens })
    const samples = [sample(0, times(9, 0, 0, 0)), sample(50_000, times(9, 30, 0, 0))]
    expect(recent(samples, 'betweenTokens')!.counts).toEqual([0, 30, 0, 0])
    samples[1] = sample(50_000, times(9, 3, 0, 0))
    expect(recent(samples, 'betweenTokens')!.counts).toEqual([9, 3, 0, 0])
    expect(since(times(1, 0, 0, 0), times(9, 0, 0, 0))!.counts).toEqual([1, 0, 0, 0])
  })
})

describe('room', () => {
  it('is told in tokens, or in texts where no layer keeps positions', () => {
    expect(room({ kv_tokens: 1000 })).toBe('1,000 tokens')
    expect(room({ kv_tokens: 5e9, most_texts: 300 })).toBe('300 texts at once')
  })
})

describe('why it is slow', () => {
  const even = [worker('a', 0, 4), worker('b', 4, 8)]
  const slow = [worker('a', 0, 4), { ...worker('b', 4, 8), seconds_per_token: 0.03 }]
  const titles = (workers: typeof even, more = {}, status = {}) =>
    why(cluster(workers, status), pipeline(workers, more))!.findings.map((one) => one.title)

  it('adds up to the whole', () => {
    const found = why(cluster(slow), pipeline(slow, { outside_s: 0.01 }))!
    expect(found.parts.map((part) => part.kind)).toEqual(['compute', 'compute', 'network'])
    expect(found.round_trip_s).toBeCloseTo(0.05)
  })

  it('names the slowest stage, or says that there is none', () => {
    expect(titles(slow)).toContain('b is the slowest stage')
    expect(titles(even)).toContain('The stages are even')
  })

  it('tells network from computing, and whether another machine helps', () => {
    expect(titles(even, { outside_s: 0.1 })).toEqual(
      expect.arrayContaining([
        "The network takes 83 % of a token's time",
        'Another machine would not help one answer',
      ]),
    )
    expect(titles(even)).toContain('Another machine would help many answers at once')
    const idle = { ...worker('c'), gain: 0.4, advice: 'it computes fast' }
    expect(titles([...even, idle])).toContain('c would help')
    const burden = [even[0]!, { ...even[1]!, gain: -0.2, advice: 'its link is slow' }]
    expect(titles(burden)).toContain('Without b it would be faster')
  })

  it('tells of memory that is full, of idle machines, and of a better split', () => {
    expect(titles(even, { kv_tokens_used: 950 }, { answers_waiting: 3 })).toContain('3 answers wait for memory')
    expect(titles(even, { bubble_ratio: 0.5 })).toContain('Machines are idle 50 % of the time')
    const forecast = { tokens_per_s: 10, full_tokens_per_s: 20, alone_tokens_per_s: 8, better_tokens_per_s: 15 }
    expect(titles(even, { forecast })).toContain('A better split is known: 10 → 15 tokens/s')
  })

  it('says nothing before anything was measured', () => {
    const fresh = even.map((one) => ({ ...one, seconds_per_token: null }))
    expect(why(cluster(fresh), pipeline(fresh))).toBeNull()
  })
})

describe('what stands beside the picture', () => {
  it('is the worst of what just happened, then how it is', () => {
    const events = [
      event(1, 'b: no message for 3 s', { level: 'error', worker: 'b' }),
      event(2, 'loading plan 2: layers 1-8 on a', { kind: 'plan_loading' }),
      event(3, 'plan 2 serves'),
    ]
    const status = cluster([worker('a', 0, 8)], { events })
    const live = hear(NOTHING, { kind: 'status', status, at: 1000, by: 'live' })
    expect(news(live)).toMatchObject({
      level: 'error',
      worker: 'b',
      text: 'b: no message for 3 s; loading plan 2: layers 1-8 on a',
    })
    expect(reasonOf(live, 'b')).toEqual({ text: 'b: no message for 3 s', left: false })
    expect(reasonOf(live, 'x').text).toContain('no reason')
    const bye = event(4, 'b said goodbye', { kind: 'worker_left', worker: 'b' })
    expect(reasonOf(hear(live, { kind: 'event', event: bye, at: 2000 }), 'b').left).toBe(true)
    const later = hear(live, { kind: 'status', status: { ...status, events: [] }, at: 60_000, by: 'live' })
    expect(news(later).text).toBe('8 layers on 1 machine; plan 1.')
  })
})

describe('numbers', () => {
  it('read well', () => {
    expect([0, 0.00042, 0.0123, 0.5, 12.34, 300].map(say.seconds)).toEqual([
      '0 ms', '420 µs', '12.3 ms', '500 ms', '12.3 s', '5 min',
    ])
    expect([0, 1023, 1024, 1.5 * 2 ** 30].map(say.bytes)).toEqual(['0 B', '1023 B', '1 KiB', '1.5 GiB'])
    expect(say.perSecond(117e6)).toBe('117 MB/s')
    expect(say.layers({ start: 0, stop: 8 })).toBe('1–8')
    expect(say.layers({ start: 8, stop: 9 })).toBe('9')
    expect(say.layers({ start: 1, stop: 8 }, 6)).toBe('encoder 2–6, decoder 1–2')
    expect(say.layers({ start: 0, stop: 6 }, 6)).toBe('encoder 1–6')
    expect(say.layers({ start: 8, stop: 9 }, 6)).toBe('decoder 3')
    expect(say.short('a-very-long-machine-name', 12)).toHaveLength(12)
  })
})
