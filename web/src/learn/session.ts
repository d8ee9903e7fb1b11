import { useEffect, useRef, useState } from 'react'
import { generate } from '../api/generate'
import { askJson, messageOf } from '../api/http'
import type { ClusterStatus } from '../api/types'
import { NO_WALK, type Walk, withPiece } from './walk'

const TOKENS = 12
const CANDIDATES = 5

interface Tokenized {
  tokens?: number[]
  token_strs?: string[]
}

/** Asks for a short answer whose every token is traced. */
export function useWalk(model: string, status: ClusterStatus | null) {
  const [walk, setWalk] = useState<Walk>(NO_WALK)
  const [isBusy, setBusy] = useState(false)
  const [trouble, setTrouble] = useState('')
  const controller = useRef<AbortController | null>(null)
  const latest = useRef(status)
  latest.current = status
  useEffect(() => () => controller.current?.abort(), [])

  const begin = async (prompt: string) => {
    controller.current?.abort()
    const stop = (controller.current = new AbortController())
    setBusy(true)
    setTrouble('')
    setWalk(NO_WALK)
    try {
      const told = await askJson<Tokenized>('/tokenize', {
        body: { model, prompt, return_token_strs: true },
        signal: stop.signal,
      }).catch((): Tokenized => ({})) // the walk can do without
      const strs = told.token_strs ?? []
      setWalk({ ...NO_WALK, prompt: strs.map((text, i) => ({ text, id: told.tokens?.[i] ?? null })) })
      const request = {
        model,
        prompt,
        max_tokens: TOKENS,
        logprobs: CANDIDATES,
        temperature: 0.8,
        dllm_trace: true,
      }
      for await (const piece of generate(false, request, stop.signal)) {
        setWalk((walk) => withPiece(walk, piece, latest.current))
      }
    } catch (error) {
      if (!stop.signal.aborted) setTrouble(messageOf(error))
    } finally {
      if (controller.current === stop) setBusy(false)
    }
  }
  return { walk, isBusy, trouble, begin }
}
