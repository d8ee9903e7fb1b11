/** Keeps hearing of the cluster: by events while they come, else by asking again and again. */

import { ApiError, ask, askJson, messageOf } from './http'
import type { Heard } from './live'
import { eventsOf } from './sse'
import type { ClusterStatus, EventStatus } from './types'

const SILENCE_MS = 10_000
const POLL_MS = 2_000
const POLLS_BEFORE_EVENTS = 5
const MAX_WAIT_MS = 8_000

export interface Followed {
  heard: (heard: Heard) => void
  /** The key is missing or wrong; nothing more is heard. */
  refused: (why: string) => void
}

export async function follow({ heard, refused }: Followed, signal: AbortSignal): Promise<void> {
  let failures = 0
  while (!signal.aborted) {
    let hasEvents = true
    try {
      await listen(heard, signal, () => (failures = 0))
    } catch (error) {
      if (signal.aborted) return
      if (isRefusal(error)) return refused(messageOf(error))
      hasEvents = !(error instanceof ApiError && error.status >= 400 && error.status < 500)
    }
    for (let i = 0; i < POLLS_BEFORE_EVENTS && !signal.aborted; i++) {
      try {
        const status = await askJson<ClusterStatus>('/api/v1/cluster', { signal })
        heard({ kind: 'status', status, at: Date.now(), by: 'polling' })
        failures = 0
        if (hasEvents) break // they only ended: they are listened to again at once
        await pause(POLL_MS, signal)
      } catch (error) {
        if (signal.aborted) return
        if (isRefusal(error)) return refused(messageOf(error))
        failures += 1
        heard({ kind: 'away', trouble: messageOf(error) })
        await pause(Math.min(MAX_WAIT_MS, 500 * 2 ** Math.min(failures, 5)), signal)
      }
    }
    await pause(500, signal)
  }
}

async function listen(
  heard: (heard: Heard) => void,
  signal: AbortSignal,
  alive: () => void,
): Promise<void> {
  const silence = new AbortController()
  let timer = setTimeout(() => silence.abort(), SILENCE_MS)
  const restart = () => {
    clearTimeout(timer)
    timer = setTimeout(() => silence.abort(), SILENCE_MS)
  }
  try {
    const response = await ask('/api/v1/events', {
      signal: AbortSignal.any([signal, silence.signal]),
      accept: 'text/event-stream',
    })
    for await (const { event, data } of eventsOf(response)) {
      restart()
      alive()
      const at = Date.now()
      if (event === 'status') {
        heard({ kind: 'status', status: JSON.parse(data) as ClusterStatus, at, by: 'live' })
      } else if (event === 'event') {
        heard({ kind: 'event', event: JSON.parse(data) as EventStatus, at })
      } else if (event === 'error') {
        heard({ kind: 'away', trouble: troubleIn(data) })
      }
    }
  } finally {
    clearTimeout(timer)
    silence.abort()
  }
}

function troubleIn(data: string): string {
  try {
    return (JSON.parse(data) as { error?: { message?: string } }).error?.message ?? data
  } catch {
    return data
  }
}

const isRefusal = (error: unknown) => error instanceof ApiError && error.status === 401

function pause(ms: number, signal: AbortSignal): Promise<void> {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, ms)
    signal.addEventListener('abort', () => (clearTimeout(timer), resolve()), { once: true })
  })
}
