import { describe, expect, it } from 'vitest'
import { hear, type Live, NOTHING } from '../api/live'
import type { ClusterStatus } from '../api/types'
import { cluster, pipeline, worker } from '../test-cluster'
import { layOut, type Picture } from './layout'

const A = worker('a', 0, 5)
const B = worker('b', 5, 8)
const C = worker('c')

function live(...statuses: ClusterStatus[]): Live {
  return statuses.reduce(
    (known, status, i) => hear(known, { kind: 'status', status, at: i * 1000, by: 'live' }),
    NOTHING,
  )
}

function check(picture: Picture) {
  const { boxes, bars, width, height } = picture
  for (const box of boxes) {
    expect(box.x).toBeGreaterThanOrEqual(0)
    expect(box.x + box.width).toBeLessThanOrEqual(width + 0.5)
    expect(box.y + box.height).toBeLessThanOrEqual(height + 0.5)
  }
  for (const [i, one] of boxes.entries()) {
    for (const other of boxes.slice(i + 1)) {
      const apart =
        one.x + one.width <= other.x ||
        other.x + other.width <= one.x ||
        one.y + one.height <= other.y ||
        other.y + other.height <= one.y
      expect(apart, `${one.name} and ${other.name} overlap`).toBe(true)
    }
  }
  for (const bar of bars) {
    const inside = boxes.some(
      (box) => bar.x >= box.x && bar.x + bar.width <= box.x + box.width && bar.y >= box.y && bar.y + bar.height <= box.y + box.height,
    )
    expect(inside).toBe(true)
  }
  expect(new Set(bars.map((bar) => bar.key)).size).toBe(bars.length)
  expect(new Set(bars.map((bar) => bar.width.toFixed(6))).size).toBeLessThanOrEqual(1)
}

describe('the picture', () => {
  it.each([300, 360, 700, 1000, 1230, 2000])('fits into %i pixels, whatever the cluster', (width) => {
    const many = Array.from({ length: 12 }, (_, i) => worker(`w${i}`, i * 8, i * 8 + 8))
    for (const workers of [[], [C], [A, B], [A, B, C], many, [worker('one', 0, 126)]]) {
      check(layOut(live(cluster(workers)), width))
    }
    const two = [pipeline([A, B]), pipeline([worker('x', 0, 8)], { lineage: 2 })]
    check(layOut(live(cluster([A, B, worker('x', 0, 8)], { pipelines: two })), width))
    check(layOut(live(cluster([A, B, C]), cluster([A, worker('c', 5, 8)])), width))
  })

  it('has every layer once, with the machine that holds it', () => {
    const { bars, boxes } = layOut(live(cluster([A, B])), 1200)
    expect(bars.map((bar) => bar.layer)).toEqual([0, 1, 2, 3, 4, 5, 6, 7])
    const [a, b] = boxes
    expect(a!.width).toBeGreaterThan(b!.width)
    expect(bars.filter((bar) => bar.x < b!.x).length).toBe(5)
  })

  it('keeps the key of a layer that moves, so that it is seen to slide', () => {
    const before = layOut(live(cluster([A, B])), 1200)
    const after = layOut(live(cluster([worker('a', 0, 3), worker('b', 3, 8)])), 1200)
    expect(after.bars.map((bar) => bar.key)).toEqual(before.bars.map((bar) => bar.key))
    expect(after.bars[4]!.colour).not.toBe(before.bars[4]!.colour)
  })

  it('tells beforehand which layers are to move', () => {
    const move = {
      epoch: 2,
      phase: 'loading',
      why: 'faster',
      before: [],
      after: [
        { worker: 'a', layers: { start: 0, stop: 4 } },
        { worker: 'b', layers: { start: 4, stop: 8 } },
      ],
      copies: true,
      standstill_s: 0.1,
      bytes_sent: 0,
      age_s: 1,
    }
    const { bars } = layOut(live(cluster([A, B], { pipelines: [pipeline([A, B], { move })] })), 1200)
    expect(bars.map((bar) => bar.next)).toEqual([null, null, null, null, 1, null, null, null])
  })

  it('shows a machine that died where it stood, and who has its layers now', () => {
    const { boxes } = layOut(live(cluster([A, B, C]), cluster([A, worker('c', 5, 8)])), 1200)
    expect(boxes.map((box) => [box.name, box.kind])).toEqual([
      ['a', 'stage'],
      ['b', 'gone'],
      ['c', 'stage'],
    ])
    const all = layOut(live(cluster([A]), cluster([], { pipelines: [], state: 'waiting' })), 1200)
    expect(all.boxes.map((box) => [box.name, box.kind])).toEqual([['a', 'gone']])
  })
})
