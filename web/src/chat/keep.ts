/** Conversations in the browser's own storage, as many as there is room for. */

import type { Conversation } from './tree'

const SLOT = 'dllm.conversations'
export const MAX_CONVERSATIONS = 50
export const MAX_CHARS = 2_000_000

export function readConversations(storage: Storage = localStorage): Conversation[] {
  try {
    const kept: unknown = JSON.parse(storage.getItem(SLOT) ?? '[]')
    if (!Array.isArray(kept)) return []
    return kept.filter((one) => Array.isArray(one?.turns) && typeof one?.id === 'string')
  } catch {
    return []
  }
}

/** Keeps the conversations that changed last; returns those that were kept. */
export function keepConversations(
  conversations: Conversation[],
  storage: Storage = localStorage,
): Conversation[] {
  const kept = bounded(conversations)
  while (kept.length > 0) {
    try {
      storage.setItem(SLOT, JSON.stringify(kept))
      return kept
    } catch {
      kept.pop() // the storage is full
    }
  }
  storage.removeItem(SLOT)
  return kept
}

export function bounded(conversations: Conversation[]): Conversation[] {
  const latest = conversations
    .filter((one) => one.turns.length > 0)
    .sort((a, b) => b.changed - a.changed)
    .slice(0, MAX_CONVERSATIONS)
  let chars = 0
  return latest.filter((one, i) => {
    chars += JSON.stringify(one).length
    return i === 0 || chars <= MAX_CHARS
  })
}
