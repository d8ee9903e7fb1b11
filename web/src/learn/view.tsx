/** Follows one token through the stages: the kitchen, on the real cluster. */

import { type FormEvent, useEffect, useState } from 'react'
import type { Live } from '../api/live'
import type { Me } from '../api/types'
import { useReducedMotion } from '../parts/motion'
import '../style/learn.css'
import { Kitchen } from './kitchen'
import { useWalk } from './session'
import { preview, visible } from './walk'

const STEP_MS = 2_200

export default function LearnView({ live, me }: { live: Live; me: Me | null }) {
  const model = live.status?.model ?? me?.model ?? ''
  const { walk, isBusy, trouble, begin } = useWalk(model, live.status)
  const [prompt, setPrompt] = useState('Once upon a time')
  const [at, setAt] = useState(0)
  const [phase, setPhase] = useState(0)
  const [playing, setPlaying] = useState(false)
  const still = useReducedMotion()
  const token = walk.walked[at]
  const phases = (token?.stations.length ?? 0) + 2

  const submit = (event: FormEvent) => {
    event.preventDefault()
    setAt(0)
    setPhase(0)
    setPlaying(!still)
    void begin(prompt)
  }
  const isLast = phase >= phases - 1
  const atEnd = isLast && at >= walk.walked.length - 1
  useEffect(() => {
    if (!playing || !token) return
    const timer = setTimeout(() => {
      if (!isLast) setPhase(phase + 1)
      else if (at + 1 < walk.walked.length) {
        setAt(at + 1)
        setPhase(0)
      } else if (!isBusy) setPlaying(false)
    }, STEP_MS)
    return () => clearTimeout(timer)
  }, [playing, token, phase, at, isLast, isBusy, walk.walked.length])

  const back = () => {
    setPlaying(false)
    if (phase > 0) setPhase(phase - 1)
    else if (at > 0) {
      setPhase((walk.walked[at - 1]?.stations.length ?? 0) + 1)
      setAt(at - 1)
    }
  }
  const forward = () => {
    setPlaying(false)
    if (!isLast) setPhase(phase + 1)
    else if (!atEnd) {
      setAt(at + 1)
      setPhase(0)
    }
  }

  return (
    <div className="learn">
      <div className="intro">
        <h2>Follow one token through the kitchen</h2>
        <p>
          A language model is a recipe of many layers, too long for one small kitchen. So the{' '}
          <strong>head chef</strong> (the coordinator) takes the order, the <strong>prep chef</strong>{' '}
          (the first machine) cooks the first layers and hands the pan on, and the{' '}
          <strong>finishing chef</strong> (the last) does the rest. For every single token.
        </p>
      </div>
      <form className="order" onSubmit={submit}>
        <label htmlFor="order">The order</label>
        <input id="order" value={prompt} maxLength={400} onChange={(event) => setPrompt(event.target.value)} />
        <button className="primary" disabled={isBusy || !prompt.trim()}>
          {isBusy ? 'Cooking …' : 'Follow it'}
        </button>
      </form>
      {trouble && (
        <p className="trouble" role="alert">
          {trouble}
        </p>
      )}
      {walk.prompt.length + walk.walked.length > 0 && (
        <section className="card text" aria-label="The text, token by token">
          <ol className="tokens">
            {walk.prompt.map((one, i) => (
              <li key={`p${i}`} className="given" title={one.id === null ? undefined : `token ${one.id}`}>
                {visible(one.text)}
              </li>
            ))}
            {walk.walked.map((one, i) => (
              <li key={i}>
                <button
                  aria-current={i === at ? 'step' : undefined}
                  aria-label={`Token ${i + 1}: ${one.token}`}
                  onClick={() => {
                    setPlaying(false)
                    setAt(i)
                    setPhase(0)
                  }}
                >
                  {visible(one.token)}
                </button>
              </li>
            ))}
            {isBusy && <li className="coming" aria-label="more to come" />}
          </ol>
          <p className="quiet">
            Grey is your order, {walk.prompt.length} tokens. Choose a token of the answer to see how it
            came to be; “·” is a space.
          </p>
        </section>
      )}
      {!token && live.status && (
        <Kitchen walk={preview(live.status)} at={0} phase={-1} colours={live.colours} />
      )}
      {token && (
        <>
          <div className="player">
            <button onClick={back} disabled={phase === 0 && at === 0} aria-label="Back">
              ‹
            </button>
            <button className="primary" onClick={() => setPlaying(!playing)} disabled={atEnd && !isBusy}>
              {playing ? 'Pause' : 'Play'}
            </button>
            <button onClick={forward} disabled={atEnd} aria-label="Forward">
              ›
            </button>
            <span className="quiet">
              token {at + 1} of {walk.walked.length}, station {phase + 1} of {phases}
            </span>
          </div>
          <Kitchen
            walk={walk}
            at={at}
            phase={phase}
            colours={live.colours}
            onPhase={(to) => {
              setPlaying(false)
              setPhase(to)
            }}
          />
        </>
      )}
    </div>
  )
}
