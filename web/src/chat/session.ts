/** The conversations of this browser, and the answer that is being written. */

import { useCallback, useEffect, useReducer, useRef, useState } from 'react'
import { generate } from '../api/generate'
import { ApiError, messageOf } from '../api/http'
import { keepConversations, readConversations } from './keep'
import {
  type Conversation,
  lacksTemplate,
  messagesFor,
  newConversation,
  sampling,
  showing,
  type Statistics,
  textFor,
  type Turn,
  withChange,
  withTurn,
} from './tree'

export interface Chats {
  all: Conversation[]
  current: string
}

export type Change =
  | { kind: 'edit'; id: string; edit: (conversation: Conversation) => Conversation }
  | { kind: 'open'; id: string }
  | { kind: 'new'; id: string; now: number }
  | { kind: 'delete'; id: string; next: string; now: number }

export function change(chats: Chats, what: Change): Chats {
  switch (what.kind) {
    case 'edit':
      return { ...chats, all: chats.all.map((one) => (one.id === what.id ? what.edit(one) : one)) }
    case 'open':
      return { ...chats, current: what.id }
    case 'new': {
      const like = chats.all.find((one) => one.id === chats.current)
      const others = chats.all.filter((one) => one.turns.length > 0)
      return { all: [newConversation(what.id, what.now, like), ...others], current: what.id }
    }
    case 'delete': {
      const all = chats.all.filter((one) => one.id !== what.id)
      if (chats.current !== what.id) return { ...chats, all }
      return { all: [newConversation(what.next, what.now), ...all], current: what.next }
    }
  }
}

const newId = () => {
  const bytes = crypto.getRandomValues(new Uint8Array(8)) // `randomUUID` needs HTTPS
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, '0')).join('')
}

function begin(): Chats {
  const id = newId()
  return { all: [newConversation(id, Date.now()), ...readConversations()], current: id }
}

const SAVE_MS = 800
const SHOW_MS = 40

export function useChats(model: string, refused: (why: string) => void) {
  const [chats, tell] = useReducer(change, null, begin)
  const [writing, setWriting] = useState('')
  const controller = useRef<AbortController | null>(null)
  const current = chats.all.find((one) => one.id === chats.current)!

  useEffect(() => {
    const timer = setTimeout(() => keepConversations(chats.all), SAVE_MS)
    return () => clearTimeout(timer)
  }, [chats.all])
  const latest = useRef(chats.all)
  latest.current = chats.all
  useEffect(() => {
    const keep = () => void keepConversations(latest.current)
    addEventListener('pagehide', keep)
    return () => removeEventListener('pagehide', keep)
  }, [])
  useEffect(() => () => controller.current?.abort(), [])

  const edit = useCallback(
    (id: string, how: (conversation: Conversation) => Conversation) =>
      tell({ kind: 'edit', id, edit: how }),
    [],
  )

  const answer = useCallback(
    async (conversation: Conversation, to: string) => {
      const turn: Turn = { id: newId(), parent: to, role: 'assistant', content: '' }
      const { id } = conversation
      edit(id, (one) => withTurn(one, turn, Date.now()))
      setWriting(turn.id)
      const stop = (controller.current = new AbortController())
      const show = (what: Partial<Turn>) => edit(id, (one) => withChange(one, turn.id, what))
      try {
        await write(conversation, to, model, stop.signal, show)
      } catch (error) {
        if (error instanceof ApiError && lacksTemplate(error.status, error.code, error.message)) {
          const continuing = { ...conversation, continues: true }
          edit(id, (one) => ({ ...one, continues: true }))
          await write(continuing, to, model, stop.signal, show).catch((again: unknown) =>
            show({ trouble: messageOf(again) }),
          )
        } else if (!stop.signal.aborted) {
          if (error instanceof ApiError && error.status === 401) refused(error.message)
          show({ trouble: messageOf(error) })
        }
      } finally {
        if (stop.signal.aborted) show({ finish: 'stopped' })
        setWriting((now) => (now === turn.id ? '' : now))
      }
    },
    [edit, model, refused],
  )

  return {
    chats,
    current,
    writing,
    stop: () => controller.current?.abort(),
    open: (id: string) => tell({ kind: 'open', id }),
    begin: () => tell({ kind: 'new', id: newId(), now: Date.now() }),
    remove: (id: string) => tell({ kind: 'delete', id, next: newId(), now: Date.now() }),
    set: (how: (conversation: Conversation) => Conversation) => edit(current.id, how),
    show: (turn: Turn) => edit(current.id, (one) => showing(one, turn)),
    regenerate: (turn: Turn) => void answer(current, turn.parent),
    /** Says something after a turn; in place of what was said there, if something was. */
    say: (content: string, parent: string) => {
      const turn: Turn = { id: newId(), parent, role: 'user', content }
      const said = withTurn(current, turn, Date.now())
      edit(current.id, (one) => withTurn(one, turn, Date.now()))
      void answer(said, turn.id)
    },
  }
}

async function write(
  conversation: Conversation,
  to: string,
  model: string,
  signal: AbortSignal,
  show: (what: Partial<Turn>) => void,
): Promise<void> {
  const asked = conversation.continues
    ? { prompt: textFor(conversation, to), max_tokens: 200 }
    : { messages: messagesFor(conversation, to) }
  const request = { model, ...asked, ...sampling(conversation.params), dllm_trace: true }
  const began = performance.now()
  const seconds = () => (performance.now() - began) / 1000
  const turn = { content: '', reasoning: '', finish: '' }
  const statistics: Statistics = {
    prompt_tokens: 0,
    completion_tokens: 0,
    first_text_s: null,
    whole_s: 0,
    timings: null,
  }
  let shown = 0
  const present = () => {
    shown = performance.now()
    show({ ...turn, statistics: { ...statistics, whole_s: seconds() } })
  }
  try {
    for await (const piece of generate(!conversation.continues, request, signal)) {
      turn.content += piece.text
      turn.reasoning += piece.reasoning
      turn.finish = piece.finish ?? turn.finish
      if (piece.text || piece.reasoning) statistics.first_text_s ??= seconds()
      if (piece.usage) {
        statistics.prompt_tokens = piece.usage.prompt_tokens
        statistics.completion_tokens = piece.usage.completion_tokens
      }
      statistics.timings = piece.timings ?? statistics.timings
      if (performance.now() - shown > SHOW_MS) present()
    }
  } finally {
    if (statistics.first_text_s !== null || !signal.aborted) present()
  }
}
