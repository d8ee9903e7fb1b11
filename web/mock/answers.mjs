/** Made-up answers, streamed as the API streams them. */

const PROSE = `Splitting a model works because a transformer is a **stack of layers**: each one takes a row of numbers and hands on another row of the same shape.

1. The first machine turns tokens into numbers and runs its layers.
2. It sends *only the numbers* on: about 10 KB a token.
3. The last machine turns them into scores for every possible next token.

\`\`\`python
def forward(stages, hidden):
    for stage in stages:  # one machine each
        hidden = stage(hidden)
    return hidden
\`\`\`

So no machine needs to hold the whole model.`

const pieces = (text) => text.match(/\s?\S+|\s+/g) ?? []

export function traced(world) {
  return (tokens) =>
    world.plan.map((one, i) => ({
      worker: one.worker,
      layers: one.layers,
      tokens,
      bytes: tokens * (i === 0 ? 4 : 10240),
      queued_s: 0.0004,
      compute_s: world.stepOf(one) * (tokens > 1 ? 1.6 : 1) * (0.95 + world.random() * 0.1),
      link_s: i === 0 ? null : 0.0006 + world.random() * 0.002,
    }))
}

export async function answerTo(asked, isChat, hops, request, response) {
  let closed = false
  response.on('close', () => (closed = true))
  const last = isChat ? asked.messages.at(-1).content : asked.prompt
  const text = isChat ? PROSE : ' there was a little robot who lived in a house of layers, and every night she passed a lantern on.'
  const thinking = isChat && /think/.test(last) ? 'They ask how layers are split. I should name the shape that is handed on, and be short.' : ''
  const all = pieces(text).slice(0, asked.max_tokens ?? asked.max_completion_tokens ?? 400)
  const stages = hops(1)
  const head = { id: 'cmpl-1', created: Math.floor(Date.now() / 1000), model: 'Qwen/Qwen3-14B' }
  response.writeHead(200, { 'Content-Type': 'text/event-stream', 'Cache-Control': 'no-cache' })
  const send = (body) => response.write(`data: ${JSON.stringify({ ...head, ...body })}\n\n`)
  const choice = (rest) => ({ index: 0, finish_reason: null, ...rest })
  const delay = Number(process.env.MOCK_TOKEN_MS ?? 45)
  response.write(': queued\n\n')
  for (const part of pieces(thinking)) {
    send({ choices: [choice({ delta: { reasoning_content: part } })] })
    await new Promise((done) => setTimeout(done, delay / 2))
  }
  for (const [i, part] of all.entries()) {
    if (closed) return
    const rivals = [part, ' the', ' a', ' and', ' one', ' each'].slice(0, 5)
    const scores = [0.46, 0.21, 0.12, 0.07, 0.03].map((p, k) => [rivals[k], Math.log(p)])
    const extra = asked.dllm_trace ? { dllm_hops: hops(i === 0 ? pieces(last).length : 1) } : {}
    if (isChat) {
      const content = [{ token: part, logprob: scores[0][1], top_logprobs: scores.map(([token, logprob]) => ({ token, logprob })) }]
      send({ object: 'chat.completion.chunk', choices: [choice({ delta: { content: part }, ...(asked.logprobs && { logprobs: { content } }) })], ...extra })
    } else {
      const logprobs = { tokens: [part], token_logprobs: [scores[0][1]], top_logprobs: [Object.fromEntries(scores)], text_offset: [0] }
      send({ object: 'text_completion', choices: [choice({ text: part, ...(asked.logprobs && { logprobs }) })], ...extra })
    }
    await new Promise((done) => setTimeout(done, delay))
  }
  send({ choices: [isChat ? { index: 0, delta: {}, finish_reason: 'stop' } : { index: 0, text: '', finish_reason: 'length' }] })
  send({
    choices: [],
    usage: { prompt_tokens: pieces(last).length, completion_tokens: all.length, total_tokens: 0 },
    dllm_timings: {
      queued_s: 0.003,
      first_token_s: 0.31,
      decode_s: (all.length * delay) / 1000,
      stages: stages.map((hop) => ({ worker: hop.worker, layers: hop.layers, tasks: all.length, compute_s: hop.compute_s * all.length })),
    },
  })
  response.end('data: [DONE]\n\n')
}
