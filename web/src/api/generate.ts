/** Asks for an answer, and tells of it as it comes. */

import { ask, errorOf } from './http'
import { eventsOf } from './sse'
import type { Hop, Timings } from './types'

export interface Candidate {
  token: string
  /** Between 0 and 1. */
  probability: number
}

export interface Scored {
  token: string
  probability: number
  candidates: Candidate[]
}

/** The next piece of an answer. */
export interface Piece {
  text: string
  reasoning: string
  scored: Scored[]
  hops: Hop[]
  finish: string | null
  usage: { prompt_tokens: number; completion_tokens: number } | null
  timings: Timings | null
}

export async function* generate(
  isChat: boolean,
  request: Record<string, unknown>,
  signal: AbortSignal,
): AsyncGenerator<Piece> {
  const response = await ask(isChat ? '/v1/chat/completions' : '/v1/completions', {
    body: { ...request, stream: true, stream_options: { include_usage: true } },
    signal,
    accept: 'text/event-stream',
  })
  for await (const { data } of eventsOf(response)) {
    if (data === '[DONE]') return
    const chunk: unknown = JSON.parse(data)
    if ((chunk as { error?: unknown }).error) throw errorOf(500, chunk, 'The answer broke off.')
    yield pieceOf(chunk as Chunk)
  }
}

interface Chunk {
  choices?: {
    text?: string
    delta?: { content?: string | null; reasoning_content?: string | null; reasoning?: string | null }
    finish_reason?: string | null
    logprobs?: unknown
  }[]
  usage?: Piece['usage']
  dllm_hops?: Hop[]
  dllm_timings?: Timings
}

export function pieceOf(chunk: Chunk): Piece {
  const choice = chunk.choices?.[0]
  return {
    text: choice?.text ?? choice?.delta?.content ?? '',
    reasoning: choice?.delta?.reasoning_content ?? choice?.delta?.reasoning ?? '',
    scored: scoredIn(choice?.logprobs),
    hops: chunk.dllm_hops ?? [],
    finish: choice?.finish_reason ?? null,
    usage: chunk.usage ?? null,
    timings: chunk.dllm_timings ?? null,
  }
}

interface ChatLogprobs {
  content?: { token: string; logprob: number; top_logprobs?: { token: string; logprob: number }[] }[]
}

interface TextLogprobs {
  tokens?: string[]
  token_logprobs?: (number | null)[]
  top_logprobs?: (Record<string, number> | null)[]
}

/** Reads both shapes of log-probabilities: that of chats, and that of completions. */
function scoredIn(logprobs: unknown): Scored[] {
  const chat = (logprobs as ChatLogprobs | null | undefined)?.content
  if (chat) {
    return chat.map((one) => ({
      token: one.token,
      probability: Math.exp(one.logprob),
      candidates: candidates((one.top_logprobs ?? []).map((top) => [top.token, top.logprob])),
    }))
  }
  const text = logprobs as TextLogprobs | null | undefined
  return (text?.tokens ?? []).map((token, i) => ({
    token,
    probability: Math.exp(text?.token_logprobs?.[i] ?? -Infinity),
    candidates: candidates(Object.entries(text?.top_logprobs?.[i] ?? {})),
  }))
}

function candidates(pairs: [string, number][]): Candidate[] {
  return pairs
    .map(([token, logprob]) => ({ token, probability: Math.exp(logprob) }))
    .sort((a, b) => b.probability - a.probability)
}
