import { memo, type ReactNode, useMemo, useState } from 'react'
import * as say from '../parts/format'
import { inertHtml } from './markdown'
import { type Conversation, siblings, type Statistics, type Turn } from './tree'

interface Props {
  turn: Turn
  conversation: Conversation
  colours: Record<string, number>
  isWriting: boolean
  isBusy: boolean
  onShow: (turn: Turn) => void
  onRegenerate: () => void
  onEdit: (text: string) => void
}

export function Message(props: Props) {
  const { turn, conversation, isWriting, isBusy, onShow } = props
  const [editing, setEditing] = useState(false)
  const branches = <Branches turn={turn} conversation={conversation} isBusy={isBusy} onShow={onShow} />
  if (turn.role === 'user') {
    if (editing) {
      return (
        <Editor
          text={turn.content}
          onCancel={() => setEditing(false)}
          onDone={(text) => {
            setEditing(false)
            props.onEdit(text)
          }}
        />
      )
    }
    return (
      <article className="turn user" aria-label="You">
        <p className="said">{turn.content}</p>
        <footer>
          {branches}
          <button className="plain" disabled={isBusy} onClick={() => setEditing(true)}>
            Edit
          </button>
        </footer>
      </article>
    )
  }
  return (
    <article className={`turn assistant ${isWriting ? 'writing' : ''}`} aria-label="The model">
      {turn.reasoning && (
        <details className="reasoning" open={isWriting && !turn.content}>
          <summary>{isWriting && !turn.content ? 'Thinking …' : 'What it thought'}</summary>
          <Markdown text={turn.reasoning} />
        </details>
      )}
      <Markdown text={turn.content} />
      {isWriting && !turn.content && !turn.reasoning && (
        <p className="quiet pending">
          <span className="hidden">The answer is on its way</span>
          <span /> <span /> <span />
        </p>
      )}
      {turn.trouble && (
        <p className="trouble" role="alert">
          {turn.trouble}
        </p>
      )}
      {!isWriting && (
        <footer>
          {branches}
          <Copy text={turn.content} />
          <button className="plain" disabled={isBusy} onClick={props.onRegenerate}>
            Regenerate
          </button>
          {turn.finish === 'stopped' && <span className="quiet">stopped</span>}
          {turn.finish === 'length' && <span className="quiet">cut at the most tokens</span>}
          {turn.statistics && <Stats statistics={turn.statistics} colours={props.colours} />}
        </footer>
      )}
    </article>
  )
}

const Markdown = memo(function Markdown({ text }: { text: string }) {
  const html = useMemo(() => inertHtml(text), [text])
  return <div className="markdown" dangerouslySetInnerHTML={{ __html: html }} />
})

function Branches(props: Pick<Props, 'turn' | 'conversation' | 'isBusy' | 'onShow'>) {
  const { turn, conversation, isBusy, onShow } = props
  const all = siblings(conversation, turn)
  if (all.length < 2) return null
  const at = all.findIndex((one) => one.id === turn.id)
  const step = (to: number, label: string, glyph: string): ReactNode => {
    const other = all[to]
    return (
      <button className="plain" aria-label={label} disabled={!other || isBusy} onClick={() => other && onShow(other)}>
        {glyph}
      </button>
    )
  }
  return (
    <span className="branches">
      {step(at - 1, 'Previous branch', '‹')}
      <span>
        {at + 1} of {all.length}
      </span>
      {step(at + 1, 'Next branch', '›')}
    </span>
  )
}

function Copy({ text }: { text: string }) {
  const [copied, setCopied] = useState(false)
  const copy = () => {
    navigator.clipboard?.writeText(text).then(
      () => setCopied(true),
      () => {},
    )
  }
  return (
    <button className="plain" onClick={copy}>
      {copied ? 'Copied' : 'Copy'}
    </button>
  )
}

function Editor(props: { text: string; onCancel: () => void; onDone: (text: string) => void }) {
  const [text, setText] = useState(props.text)
  return (
    <article className="turn user editing" aria-label="You, editing">
      <textarea
        aria-label="Edit your message"
        rows={Math.min(12, text.split('\n').length + 1)}
        value={text}
        autoFocus
        onChange={(event) => setText(event.target.value)}
      />
      <footer>
        <button className="primary" disabled={!text.trim()} onClick={() => props.onDone(text)}>
          Ask anew
        </button>
        <button onClick={props.onCancel}>Cancel</button>
      </footer>
    </article>
  )
}

/** Tokens per second after the first; null if there were too few. */
export function pace({ timings, completion_tokens, first_text_s, whole_s }: Statistics): number | null {
  const seconds = timings?.decode_s ?? whole_s - (first_text_s ?? whole_s)
  return completion_tokens > 1 && seconds > 0 ? (completion_tokens - 1) / seconds : null
}

function Stats({ statistics, colours }: { statistics: Statistics; colours: Record<string, number> }) {
  const { timings, completion_tokens, prompt_tokens } = statistics
  const rate = pace(statistics)
  const total = timings?.stages.reduce((sum, stage) => sum + stage.compute_s, 0) ?? 0
  return (
    <details className="stats">
      <summary>
        {say.count(completion_tokens, 'token')}
        {rate !== null && `, ${say.rate(rate)} a second`}
        {timings && total > 0 && (
          <span className="split" aria-hidden="true">
            {timings.stages.map((stage, i) => (
              <span
                key={i}
                className={`fill m${colours[stage.worker] ?? 0}`}
                style={{ flexGrow: stage.compute_s / total }}
              />
            ))}
          </span>
        )}
      </summary>
      <dl>
        <dt>Prompt</dt>
        <dd>{say.count(prompt_tokens, 'token')}</dd>
        <dt>First text</dt>
        <dd>after {say.seconds(statistics.first_text_s)}</dd>
        {timings && (
          <>
            <dt>Waited</dt>
            <dd>{say.seconds(timings.queued_s)}</dd>
            {timings.stages.map((stage, i) => (
              <div key={i}>
                <dt>
                  <span className={`swatch fill m${colours[stage.worker] ?? 0}`} />
                  {stage.worker}
                </dt>
                <dd>
                  layers {say.layers(stage.layers)}: {say.seconds(stage.compute_s)} in{' '}
                  {say.count(stage.tasks, 'step')}, {say.percent(total > 0 ? stage.compute_s / total : 0)}
                </dd>
              </div>
            ))}
          </>
        )}
      </dl>
    </details>
  )
}
