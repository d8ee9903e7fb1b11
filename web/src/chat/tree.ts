/** Conversations with branches: every turn knows what it answers. Pure. */

import type { Timings } from '../api/types'

export interface Statistics {
  prompt_tokens: number
  completion_tokens: number
  /** As the browser saw it, from sending to the first text. */
  first_text_s: number | null
  whole_s: number
  timings: Timings | null
}

export interface Turn {
  id: string
  /** The turn that it follows; empty for the first. */
  parent: string
  role: 'user' | 'assistant'
  content: string
  reasoning?: string
  statistics?: Statistics
  finish?: string
  trouble?: string
}

export interface Params {
  temperature: string
  top_p: string
  max_tokens: string
  seed: string
}

export interface Conversation {
  id: string
  changed: number
  system: string
  params: Params
  /** Whether the model lacks a chat template, so that it continues the text instead. */
  continues: boolean
  turns: Turn[]
  /** The branch that is shown: by a turn, which of those that follow it. */
  chosen: Record<string, string>
}

export const NO_PARAMS: Params = { temperature: '', top_p: '', max_tokens: '', seed: '' }

export function newConversation(id: string, now: number, like?: Conversation): Conversation {
  return {
    id,
    changed: now,
    system: like?.system ?? '',
    params: like?.params ?? NO_PARAMS,
    continues: like?.continues ?? false,
    turns: [],
    chosen: {},
  }
}

export function titleOf(conversation: Conversation): string {
  const first = shownTurns(conversation)[0]?.content.trim().split('\n')[0]
  return first ? first.slice(0, 60) : 'New conversation'
}

/** The turns of the branch that is shown. */
export function shownTurns(conversation: Conversation): Turn[] {
  const byId = new Map(conversation.turns.map((turn) => [turn.id, turn]))
  const shown: Turn[] = []
  let at = ''
  for (;;) {
    const next = byId.get(conversation.chosen[at] ?? '')
    if (!next || next.parent !== at || shown.length > byId.size) return shown
    shown.push(next)
    at = next.id
  }
}

/** The turns up to one, from the first. */
export function turnsUpTo(conversation: Conversation, id: string): Turn[] {
  const byId = new Map(conversation.turns.map((turn) => [turn.id, turn]))
  const turns: Turn[] = []
  for (let turn = byId.get(id); turn && turns.length <= byId.size; turn = byId.get(turn.parent)) {
    turns.unshift(turn)
  }
  return turns
}

export function siblings(conversation: Conversation, turn: Turn): Turn[] {
  return conversation.turns.filter((one) => one.parent === turn.parent)
}

/** Adds a turn and shows its branch. */
export function withTurn(conversation: Conversation, turn: Turn, now: number): Conversation {
  return {
    ...conversation,
    changed: now,
    turns: [...conversation.turns, turn],
    chosen: { ...conversation.chosen, [turn.parent]: turn.id },
  }
}

export function withChange(conversation: Conversation, id: string, change: Partial<Turn>): Conversation {
  const turns = conversation.turns.map((turn) => (turn.id === id ? { ...turn, ...change } : turn))
  return { ...conversation, turns }
}

export function showing(conversation: Conversation, turn: Turn): Conversation {
  return { ...conversation, chosen: { ...conversation.chosen, [turn.parent]: turn.id } }
}

/** The request for an answer to a turn, without what its mode needs. */
export function sampling(params: Params): Record<string, number> {
  const asked: Record<string, number> = {}
  for (const [name, text] of Object.entries(params)) {
    const value = Number(text)
    if (text.trim() !== '' && Number.isFinite(value)) asked[name] = value
  }
  return asked
}

export function messagesFor(conversation: Conversation, id: string) {
  const turns = turnsUpTo(conversation, id).map(({ role, content }) => ({ role, content }))
  const system = conversation.system.trim()
  return system ? [{ role: 'system', content: system }, ...turns] : turns
}

/** The text that a model without a chat template is to continue. */
export function textFor(conversation: Conversation, id: string): string {
  const system = conversation.system.trim()
  let text = system ? `${system}\n\n` : ''
  turnsUpTo(conversation, id).forEach((turn, i) => {
    text += (i > 0 && turn.role === 'user' ? '\n' : '') + turn.content
  })
  return text
}

export function lacksTemplate(status: number, code: string | null, message: string): boolean {
  return status === 400 && (code === 'no_chat_template' || /chat template/i.test(message))
}
