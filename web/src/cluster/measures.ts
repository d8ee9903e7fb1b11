/** Figures of the cluster that are computed from what it tells. Pure. */

import type { Sample } from '../api/live'
import type { ClusterStatus, Histogram } from '../api/types'
import { number } from '../parts/format'

const ENOUGH = 20
const RECENT_MS = 60_000

/** Time that a share `q` of all stay below, as far as the buckets tell; null of nothing. */
export function quantile(histogram: Histogram | undefined, q: number): number | null {
  const total = histogram?.counts.reduce((sum, count) => sum + count, 0) ?? 0
  if (!histogram || total === 0) return null
  let below = 0
  for (const [i, count] of histogram.counts.entries()) {
    if (count > 0 && below + count >= q * total) {
      const low = histogram.bounds_s[i - 1] ?? 0
      const high = histogram.bounds_s[i] ?? low
      return low + ((high - low) * (q * total - below)) / count
    }
    below += count
  }
  return histogram.bounds_s.at(-1) ?? null
}

/** What was added to a histogram since an earlier look at it; all of it if they do not match. */
export function since(now: Histogram | undefined, then: Histogram | undefined) {
  if (!now || !then || then.counts.length !== now.counts.length) return now
  const counts = now.counts.map((count, i) => count - (then.counts[i] ?? 0))
  if (counts.some((count) => count < 0)) return now
  return { ...now, counts, sum_s: now.sum_s - then.sum_s }
}

/** The last minute's times if there were enough in it, else all. */
export function recent(samples: Sample[], key: 'firstToken' | 'betweenTokens') {
  const last = samples.at(-1)
  const first = samples.find((one) => last && last.at - one.at <= RECENT_MS)
  const added = since(last?.[key], first?.[key])
  const times = added?.counts.reduce((sum, count) => sum + count, 0) ?? 0
  return times >= ENOUGH ? added : last?.[key]
}

/** What there is room for: tokens, or texts of any length where no layer keeps positions. */
export function room(status: Pick<ClusterStatus, 'kv_tokens' | 'most_texts'>): string {
  return status.most_texts ? `${number(status.most_texts)} texts at once` : `${number(status.kv_tokens)} tokens`
}
