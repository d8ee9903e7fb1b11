import { describe, expect, it } from 'vitest'
import { bounded, keepConversations, MAX_CHARS, MAX_CONVERSATIONS, readConversations } from './keep'
import { change, type Chats } from './session'
import {
  type Conversation,
  lacksTemplate,
  messagesFor,
  newConversation,
  sampling,
  showing,
  shownTurns,
  siblings,
  textFor,
  type Turn,
  withChange,
  withTurn,
} from './tree'

const turn = (id: string, parent: string, role: Turn['role'], content = id): Turn => ({ id, parent, role, content })

function talk(...turns: Turn[]): Conversation {
  return turns.reduce((one, next, i) => withTurn(one, next, i), newConversation('c', 0))
}

const ids = (conversation: Conversation) => shownTurns(conversation).map((one) => one.id)

describe('a conversation', () => {
  const straight = talk(turn('q1', '', 'user'), turn('a1', 'q1', 'assistant'), turn('q2', 'a1', 'user'))

  it('branches where something is said or answered anew, and loses nothing', () => {
    const again = withTurn(straight, turn('a1b', 'q1', 'assistant'), 9)
    expect(ids(again)).toEqual(['q1', 'a1b'])
    expect(siblings(again, again.turns[1]!).map((one) => one.id)).toEqual(['a1', 'a1b'])
    expect(ids(showing(again, again.turns[1]!))).toEqual(['q1', 'a1', 'q2'])
    const edited = withTurn(again, turn('q1b', '', 'user'), 10)
    expect(ids(edited)).toEqual(['q1b'])
    expect(ids(showing(edited, edited.turns[0]!))).toEqual(['q1', 'a1b'])
  })

  it('is asked with its own branch only', () => {
    const again = withTurn(straight, turn('a1b', 'q1', 'assistant'), 9)
    expect(messagesFor({ ...again, system: ' be brief ' }, 'q2')).toEqual([
      { role: 'system', content: 'be brief' },
      { role: 'user', content: 'q1' },
      { role: 'assistant', content: 'a1' },
      { role: 'user', content: 'q2' },
    ])
    expect(textFor(again, 'q2')).toBe('q1a1\nq2')
  })

  it('changes one turn as its answer comes', () => {
    const changed = withChange(straight, 'a1', { content: 'more' })
    expect(changed.turns.map((one) => one.content)).toEqual(['q1', 'more', 'q2'])
  })

  it('asks for no more than was filled in', () => {
    expect(sampling({ temperature: '0.5', top_p: '', max_tokens: ' 20 ', seed: 'x' })).toEqual({
      temperature: 0.5,
      max_tokens: 20,
    })
  })

  it('goes on without a chat template', () => {
    expect(lacksTemplate(400, null, 'The model has no chat template')).toBe(true)
    expect(lacksTemplate(400, 'no_chat_template', '')).toBe(true)
    expect(lacksTemplate(400, null, 'too long')).toBe(false)
    expect(lacksTemplate(503, null, 'no chat template')).toBe(false)
  })
})

describe('the conversations of a browser', () => {
  const many = Array.from({ length: 80 }, (_, i) => ({ ...talk(turn('q', '', 'user')), id: `${i}`, changed: i }))

  it('are bounded in number and in size, and the latest stay', () => {
    expect(bounded(many).length).toBe(MAX_CONVERSATIONS)
    expect(bounded(many)[0]!.id).toBe('79')
    const large = many.map((one) => withChange(one, 'q', { content: 'x'.repeat(MAX_CHARS / 4) }))
    expect(bounded(large).length).toBe(3)
  })

  it('are kept, as many as fit, and read again whatever is there', () => {
    const slots = new Map<string, string>()
    const room = 3000
    const storage = {
      getItem: (key: string) => slots.get(key) ?? null,
      setItem: (key: string, text: string) => {
        if (text.length > room) throw new Error('QuotaExceededError')
        slots.set(key, text)
      },
      removeItem: (key: string) => slots.delete(key),
    } as unknown as Storage
    const kept = keepConversations(many, storage)
    expect(kept.length).toBeGreaterThan(1)
    expect(kept.length).toBeLessThan(MAX_CONVERSATIONS)
    expect(readConversations(storage)).toEqual(kept)
    for (const text of ['', '{', '{}', '[1, null, {"id": "x"}]']) {
      slots.set('dllm.conversations', text)
      expect(readConversations(storage)).toEqual([])
    }
  })

  it('begin with the settings of the last, and leave no empty ones behind', () => {
    const first = { ...newConversation('a', 0), system: 'be brief' }
    let chats: Chats = { all: [first], current: 'a' }
    chats = change(chats, { kind: 'new', id: 'b', now: 1 })
    expect(chats.all.map((one) => [one.id, one.system])).toEqual([['b', 'be brief']])
    chats = change(chats, { kind: 'edit', id: 'b', edit: (one) => withTurn(one, turn('q', '', 'user'), 2) })
    chats = change(chats, { kind: 'new', id: 'c', now: 3 })
    chats = change(chats, { kind: 'open', id: 'b' })
    chats = change(chats, { kind: 'delete', id: 'b', next: 'd', now: 4 })
    expect([chats.all.map((one) => one.id), chats.current]).toEqual([['d', 'c'], 'd'])
  })
})
