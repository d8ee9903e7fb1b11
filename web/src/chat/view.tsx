/** A chat with the model: branches, statistics, several conversations. */

import { type FormEvent, type KeyboardEvent, useEffect, useRef, useState } from 'react'
import type { Live } from '../api/live'
import type { Me } from '../api/types'
import '../style/chat.css'
import { Message } from './message'
import { useChats } from './session'
import { Settings } from './settings'
import { shownTurns, titleOf } from './tree'

interface Props {
  live: Live
  me: Me | null
  onRefused: (why: string) => void
}

export default function ChatView({ live, me, onRefused }: Props) {
  const model = live.status?.model ?? me?.model ?? ''
  const session = useChats(model, onRefused)
  const { current, chats, writing } = session
  const turns = shownTurns(current)
  const end = useRef<HTMLDivElement>(null)
  const last = turns.at(-1)
  const length = (last?.content.length ?? 0) + (last?.reasoning?.length ?? 0)
  useEffect(() => {
    if (writing && nearTheEnd()) end.current?.scrollIntoView({ block: 'end' })
  }, [writing, length])

  return (
    <div className="chat">
      <aside aria-label="Conversations">
        <button className="begin" onClick={session.begin} disabled={current.turns.length === 0}>
          New conversation
        </button>
        <ul>
          {chats.all.map((one) => (
            <li key={one.id} className={one.id === current.id ? 'open' : ''}>
              <button
                className="plain"
                onClick={() => session.open(one.id)}
                aria-current={one.id === current.id ? 'true' : undefined}
              >
                {titleOf(one)}
              </button>
              {one.turns.length > 0 && (
                <button
                  className="plain delete"
                  aria-label={`Delete “${titleOf(one)}”`}
                  onClick={() => session.remove(one.id)}
                >
                  ×
                </button>
              )}
            </li>
          ))}
        </ul>
      </aside>
      <section className="thread" aria-label="Conversation">
        <h2 className="hidden">{titleOf(current)}</h2>
        {turns.length === 0 && <Welcome model={model} onAsk={(text) => session.say(text, '')} />}
        {current.continues && (
          <p className="notice">
            This model has no chat template, so it does not know of questions and answers: it continues
            your text instead.
          </p>
        )}
        <div className="turns" role="log" aria-busy={writing !== ''}>
          {turns.map((turn) => (
            <Message
              key={turn.id}
              turn={turn}
              conversation={current}
              colours={live.colours}
              isWriting={writing === turn.id}
              isBusy={writing !== ''}
              onShow={session.show}
              onRegenerate={() => session.regenerate(turn)}
              onEdit={(text) => session.say(text, turn.parent)}
            />
          ))}
        </div>
        <div ref={end} className="end" />
        <div className="composing">
          <Composer
            isWriting={writing !== ''}
            onStop={session.stop}
            onSay={(text) => session.say(text, last?.id ?? '')}
          />
          <Settings conversation={current} onChange={session.set} />
        </div>
      </section>
    </div>
  )
}

function nearTheEnd(): boolean {
  const page = document.documentElement
  return page.scrollHeight - page.scrollTop - page.clientHeight < 220
}

const SUGGESTIONS = [
  'Tell me a story about a robot.',
  'How does one language model run on several machines?',
  'Write a function that sorts a list by length.',
]

function Welcome({ model, onAsk }: { model: string; onAsk: (text: string) => void }) {
  return (
    <div className="welcome">
      <p className="big">What shall the cluster think about?</p>
      <p className="quiet">{model && `${model.split('/').at(-1)} answers, every token through all of its machines.`}</p>
      <div className="suggestions">
        {SUGGESTIONS.map((text) => (
          <button key={text} onClick={() => onAsk(text)}>
            {text}
          </button>
        ))}
      </div>
    </div>
  )
}

interface ComposerProps {
  isWriting: boolean
  onStop: () => void
  onSay: (text: string) => void
}

function Composer({ isWriting, onStop, onSay }: ComposerProps) {
  const [text, setText] = useState('')
  const field = useRef<HTMLTextAreaElement>(null)
  useEffect(() => {
    const area = field.current
    if (!area) return
    area.style.height = 'auto'
    area.style.height = `${Math.min(240, area.scrollHeight + 2)}px`
  }, [text])
  const send = (event?: FormEvent) => {
    event?.preventDefault()
    if (isWriting || !text.trim()) return
    onSay(text)
    setText('')
  }
  const pressed = (event: KeyboardEvent) => {
    if (event.key === 'Enter' && !event.shiftKey && !event.nativeEvent.isComposing) {
      event.preventDefault()
      send()
    }
    if (event.key === 'Escape' && isWriting) onStop()
  }
  return (
    <form className="composer" onSubmit={send}>
      <label className="hidden" htmlFor="say">
        Message
      </label>
      <textarea
        id="say"
        ref={field}
        rows={1}
        value={text}
        placeholder="Say something"
        onChange={(event) => setText(event.target.value)}
        onKeyDown={pressed}
      />
      {isWriting ? (
        <button type="button" onClick={onStop}>
          Stop
        </button>
      ) : (
        <button className="primary" disabled={!text.trim()}>
          Send
        </button>
      )}
    </form>
  )
}
