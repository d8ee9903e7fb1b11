import { describe, expect, it } from 'vitest'
import { pieceOf } from '../api/generate'
import { keyInFragment } from '../api/key'
import { cluster, worker } from '../test-cluster'
import { chef, NO_WALK, shapeText, visible, withPiece } from './walk'

const prompt = [
  { text: 'Once', id: 1 },
  { text: ' upon', id: 2 },
]
const hop = (name: string, start: number, stop: number) => ({
  worker: name,
  layers: { start, stop },
  tokens: 2,
  shape: [2, 128],
  compute_s: 0.01,
  bytes: 512,
})

describe('a piece of an answer', () => {
  it('is read from a chat and from a completion', () => {
    const chat = pieceOf({
      choices: [
        {
          delta: { content: 'a', reasoning_content: 'b' },
          logprobs: { content: [{ token: 'a', logprob: 0, top_logprobs: [{ token: 'c', logprob: -1 }, { token: 'a', logprob: 0 }] }] },
        },
      ],
      dllm_hops: [hop('x', 0, 4)],
    })
    expect([chat.text, chat.reasoning, chat.hops.length]).toEqual(['a', 'b', 1])
    expect(chat.scored[0]!.candidates.map((one) => one.token)).toEqual(['a', 'c'])
    const text = pieceOf({
      choices: [{ text: 'a', finish_reason: 'stop', logprobs: { tokens: ['a'], token_logprobs: [0], top_logprobs: [{ a: 0, c: -1 }] } }],
    })
    expect(text.scored).toEqual(chat.scored)
    expect(text.finish).toBe('stop')
    expect(pieceOf({}).text).toBe('')
    expect(pieceOf({ choices: [{ delta: { content: null } }] }).text).toBe('')
  })
})

describe('the way of a token', () => {
  it('is that of its hops, the prompt together and then one by one', () => {
    const piece = pieceOf({ choices: [{ text: ' a' }], dllm_hops: [hop('x', 0, 4), hop('y', 4, 8)] })
    const walk = withPiece({ ...NO_WALK, prompt }, piece, null)
    expect(walk.traced).toBe(true)
    expect(walk.walked[0]!.tokens).toBe(2)
    expect(walk.walked[0]!.stations.map((one) => [one.worker, one.shape])).toEqual([
      ['x', [2, 128]],
      ['y', [2, 128]],
    ])
  })

  it('is the last pass of each token, where there are several', () => {
    const hops = ['x', 'y', 'x', 'y', 'x', 'y'].map((name) => hop(name, name === 'x' ? 0 : 4, 8))
    const logprobs = { tokens: [' a', 'b'], token_logprobs: [0, 0], top_logprobs: [{}, {}] }
    const piece = pieceOf({ choices: [{ text: ' ab', logprobs }], dllm_hops: hops })
    const { walked } = withPiece(NO_WALK, piece, null)
    expect(walked.map((one) => one.stations.map((station) => station.worker))).toEqual([
      ['x', 'y'],
      ['x', 'y'],
    ])
  })

  it('is that of the cluster where nothing is traced', () => {
    const status = cluster([worker('x', 0, 4), worker('y', 4, 8)])
    let walk = withPiece({ ...NO_WALK, prompt }, pieceOf({ choices: [{ text: ' a' }] }), status)
    walk = withPiece(walk, pieceOf({ choices: [{ text: ' b' }] }), status)
    walk = withPiece(walk, pieceOf({ choices: [{ text: '' }] }), status)
    expect(walk.traced).toBe(false)
    expect(walk.walked.map((one) => [one.token, one.tokens])).toEqual([
      [' a', 2],
      [' b', 1],
    ])
    expect(walk.walked[0]!.stations.map((one) => one.compute_s)).toEqual([0.01, 0.01])
  })

  it('is told in words of the kitchen', () => {
    expect([0, 1, 2].map((i) => chef(i, 3))).toEqual(['prep chef', 'line chef', 'finishing chef'])
    expect(chef(0, 1)).toBe('the only chef')
    expect(shapeText([4, 5120])).toBe('4 × 5,120')
    expect(visible(' a\n')).toBe('·a↵')
  })
})

describe('the key in an address', () => {
  it('is found in the fragment only', () => {
    expect(keyInFragment('#key=dllm-ab_c.d')).toBe('dllm-ab_c.d')
    expect(keyInFragment('#key=a%2Bb')).toBe('a+b')
    expect(keyInFragment('#cluster')).toBeNull()
    expect(keyInFragment('')).toBeNull()
  })
})
