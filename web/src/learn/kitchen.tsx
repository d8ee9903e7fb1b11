import type { ReactNode } from 'react'
import type { Candidate } from '../api/generate'
import * as say from '../parts/format'
import { chef, shapeText, type Station, visible, type Walk, type Walked } from './walk'

interface Props {
  walk: Walk
  at: number
  phase: number
  colours: Record<string, number>
  /** Absent while there is no token to follow yet. */
  onPhase?: (phase: number) => void
}

export function Kitchen({ walk, at, phase, colours, onPhase }: Props) {
  const token = walk.walked[at]!
  const { stations } = token
  const last = stations.length + 1
  const before = at === 0 ? null : walk.walked[at - 1]!
  return (
    <section className="kitchen" aria-label="The stations of this token">
      <ol>
        <Card
          who="head chef"
          name="coordinator"
          paint="coordinator"
          state={stateOf(0, phase)}
          onOpen={onPhase && (() => onPhase(0))}
        >
          {before ? (
            <p>
              Takes the token it chose last, <Token text={before.token} />, and orders the next one.
            </p>
          ) : (
            <p>
              Reads the order and cuts it into{' '}
              <strong>{walk.prompt.length > 0 ? say.count(walk.prompt.length, 'token') : 'tokens'}</strong>
              {walk.prompt[0]?.id != null && <>: the numbers {ids(walk)}</>}.
            </p>
          )}
        </Card>
        {stations.map((station, i) => (
          <StationCard
            key={`${station.worker}-${i}`}
            station={station}
            token={token}
            index={i}
            count={stations.length}
            paint={`m${colours[station.worker] ?? 0}`}
            state={stateOf(i + 1, phase)}
            isFirstStep={at === 0}
            onOpen={onPhase && (() => onPhase(i + 1))}
          />
        ))}
        <Card
          who="head chef"
          name="coordinator"
          paint="coordinator"
          state={stateOf(last, phase)}
          onOpen={onPhase && (() => onPhase(last))}
        >
          {phase < last ? (
            <p>Will taste the scores of all tokens, and choose one.</p>
          ) : (
            <>
              <p>
                Tastes the scores of all tokens and chooses <Token text={token.token} />.
              </p>
              {token.candidates.length > 0 && (
                <Candidates candidates={token.candidates} chosen={token.token} />
              )}
            </>
          )}
        </Card>
      </ol>
      <p className="quiet explain" hidden={!onPhase}>
        {at === 0
          ? 'The first step takes the whole order at once: that is the prefill.'
          : 'From the second step on only one token passes: the machines remember the others in their KV cache.'}{' '}
        {!walk.traced && 'This server does not trace single tokens: the times are means of its machines.'}
      </p>
    </section>
  )
}

type State = 'done' | 'now' | 'later'

const stateOf = (station: number, phase: number): State =>
  station < phase ? 'done' : station === phase ? 'now' : 'later'

function ids(walk: Walk): string {
  const shown = walk.prompt.slice(0, 6).map((one) => one.id)
  return shown.join(', ') + (walk.prompt.length > 6 ? ', …' : '')
}

interface CardProps {
  who: string
  name: string
  paint: string
  state: State
  onOpen: (() => void) | undefined
  children: ReactNode
}

function Card({ who, name, paint, state, onOpen, children }: CardProps) {
  return (
    <li className={`station ${paint} ${state}`} aria-current={state === 'now' ? 'step' : undefined}>
      <button className="plain title" disabled={!onOpen} onClick={onOpen}>
        <span className="who">{who}</span>
        <span className="name">{name}</span>
      </button>
      {children}
    </li>
  )
}

interface StationProps {
  station: Station
  token: Walked
  index: number
  count: number
  paint: string
  state: State
  isFirstStep: boolean
  onOpen: (() => void) | undefined
}

function StationCard(props: StationProps) {
  const { station, token, index, count, isFirstStep, ...card } = props
  const range = station.layers
  const size = range ? range.stop - range.start : 0
  return (
    <Card who={chef(index, count)} name={station.worker} {...card}>
      {range && (
        <>
          <span className="pans" aria-hidden="true">
            {Array.from({ length: Math.min(size, 48) }, (_, i) => (
              <span key={i} className={`fill ${card.paint}`} style={{ transitionDelay: `${i * 30}ms` }} />
            ))}
          </span>
          <p>
            {index === 0 ? 'Turns every token into a row of numbers, then cooks' : 'Cooks'} layers{' '}
            <strong>{say.layers(range)}</strong>.
          </p>
        </>
      )}
      <dl>
        <Fact what={isFirstStep ? 'tokens at once' : 'tokens'} value={say.number(token.tokens)} />
        {station.shape.length > 1 && <Fact what="numbers" value={shapeText(station.shape)} />}
        {station.bytes !== null && (
          <Fact what={index === 0 ? 'came in, as ids' : 'came in'} value={say.bytes(station.bytes)} />
        )}
        {station.bytes !== null && index > 0 && token.tokens > 1 && (
          <Fact what="for each token" value={say.bytes(station.bytes / token.tokens)} />
        )}
        {station.link_s !== null && <Fact what="on the way" value={say.seconds(station.link_s)} />}
        {station.queued_s !== null && <Fact what="waited" value={say.seconds(station.queued_s)} />}
        <Fact what="computed" value={say.seconds(station.compute_s)} />
      </dl>
    </Card>
  )
}

function Fact({ what, value }: { what: string; value: string }) {
  return (
    <div>
      <dt>{what}</dt>
      <dd>{value}</dd>
    </div>
  )
}

const Token = ({ text }: { text: string }) => <span className="atoken">{visible(text)}</span>

function Candidates({ candidates, chosen }: { candidates: Candidate[]; chosen: string }) {
  const most = Math.max(...candidates.map((one) => one.probability), 1e-9)
  return (
    <ol className="candidates" aria-label="The likeliest tokens">
      {candidates.map((one) => (
        <li key={one.token} className={one.token === chosen ? 'chosen' : ''}>
          <span className="atoken">{visible(one.token)}</span>
          <span className="chance">
            <span style={{ width: `${(one.probability / most) * 100}%` }} />
          </span>
          <span className="number">{say.percent(one.probability)}</span>
        </li>
      ))}
    </ol>
  )
}
