/** Serves the built page and a made-up cluster: `node mock/server.mjs [PORT]`.
 *
 * Keys: admin-key and client-key. POST /mock/scene with {"scene": NAME} plays: reset, death,
 * moving, away, back, completion-only, chat.
 */

import { readFile } from 'node:fs/promises'
import { createServer } from 'node:http'
import { extname, join, normalize } from 'node:path'
import { fileURLToPath } from 'node:url'
import { gzipSync } from 'node:zlib'
import { answerTo, traced } from './answers.mjs'
import { World } from './world.mjs'

const STATIC = fileURLToPath(new URL('../../distributed_llm/api/page/static/', import.meta.url))
const TYPES = {
  '.html': 'text/html; charset=utf-8',
  '.js': 'text/javascript; charset=utf-8',
  '.css': 'text/css; charset=utf-8',
  '.svg': 'image/svg+xml',
  '.woff2': 'font/woff2',
}
const POLICY = "default-src 'self'; base-uri 'none'; object-src 'none'; frame-ancestors 'none'; form-action 'self'"
const KEYS = { 'admin-key': { name: 'anna', role: 'admin' }, 'client-key': { name: 'guest', role: 'client' } }

const world = new World()
let chatTemplate = true

const json = (response, status, body) => {
  response.writeHead(status, { 'Content-Type': 'application/json' })
  response.end(JSON.stringify(body))
}
const refuse = (response, status, message, code = null) =>
  json(response, status, { error: { message, type: 'invalid_request_error', param: null, code } })

async function file(response, path) {
  const name = normalize(path === '/' ? '/index.html' : path)
  try {
    const data = await readFile(join(STATIC, name))
    const type = TYPES[extname(name)] ?? 'application/octet-stream'
    const packed = type !== 'font/woff2'
    response.writeHead(200, {
      'Content-Type': type,
      ...(packed && { 'Content-Encoding': 'gzip' }),
      'Content-Security-Policy': POLICY,
      'X-Content-Type-Options': 'nosniff',
      'Referrer-Policy': 'no-referrer',
    })
    response.end(packed ? gzipSync(data) : data)
  } catch {
    refuse(response, 404, `There is nothing at '${path}'.`)
  }
}

async function bodyOf(request) {
  let text = ''
  for await (const part of request) text += part
  return text === '' ? {} : JSON.parse(text)
}

function events(request, response) {
  response.writeHead(200, { 'Content-Type': 'text/event-stream', 'Cache-Control': 'no-cache' })
  const send = (event, data) => response.write(`event: ${event}\ndata: ${JSON.stringify(data)}\n\n`)
  send('status', world.status())
  const timer = setInterval(() => send('status', world.status()), 1000)
  world.listeners.add(send)
  streams.add(response)
  request.on('close', () => {
    clearInterval(timer)
    world.listeners.delete(send)
    streams.delete(response)
  })
}

const streams = new Set()

function scene(name) {
  if (name === 'reset') {
    world.reset()
    chatTemplate = true
  }
  if (name === 'death') world.death()
  if (name === 'moving') world.moving()
  if (name === 'away' || name === 'back') world.away = name === 'away'
  if (name === 'away') for (const stream of streams) stream.destroy()
  if (name === 'completion-only' || name === 'chat') chatTemplate = name === 'chat'
  world.changed()
}

async function api(request, response, path) {
  const me = KEYS[(request.headers.authorization ?? '').replace('Bearer ', '')]
  if (path === '/mock/scene') {
    scene((await bodyOf(request)).scene)
    return json(response, 200, {})
  }
  if (world.away) return refuse(response, 503, 'The coordinator at 192.168.1.20:5555 does not answer.')
  if (!me) return refuse(response, 401, 'This key is not known here. `dllm up` prints the key.', 'invalid_api_key')
  if (path === '/api/v1/me') return json(response, 200, { ...me, model: world.status().model })
  if (path === '/api/v1/cluster') return json(response, 200, world.status())
  if (path === '/api/v1/events') return events(request, response)
  if (path === '/api/v1/requests') {
    const now = Date.now() / 1000
    return json(response, 200, {
      requests: [
        { id: 'chatcmpl-8f3ac2d1', path: '/v1/chat/completions', state: 'running', name: 'open-webui', tokens_per_s: 16.2, started_at: now - 8, prompt_tokens: 412, completion_tokens: 131 },
        { id: 'msg_01b7e95c', path: '/v1/messages', state: 'running', name: 'anna', tokens_per_s: 15.8, started_at: now - 3, prompt_tokens: 2210, completion_tokens: 38 },
      ],
    })
  }
  const drained = /^\/api\/v1\/workers\/([^/]+)\/drain$/.exec(path)
  if (drained) {
    if (me.role !== 'admin') return refuse(response, 403, 'Only an admin may drain a worker.')
    world.drain(decodeURIComponent(drained[1]))
    return json(response, 200, {})
  }
  if (path === '/api/v1/members') {
    const now = Date.now() / 1000
    return json(response, 200, {
      machines: [
        ...[...world.here].map((name) => ({ name, role: 'worker', key: '', enrolled_at: now - 5000, sessions: 1, quarantined_s: null })),
        { name: 'anna', role: 'admin', key: '', enrolled_at: now - 5000, sessions: 1, quarantined_s: null },
        { name: 'open-webui', role: 'client', key: '', enrolled_at: now - 5000, sessions: 1, quarantined_s: null },
      ],
      tokens: [{ id: 'k7Qm', role: 'worker', created_at: now - 60, uses_left: 1, expires_at: now + 3000 }],
      addresses: ['192.168.1.20:5555'],
    })
  }
  if (path === '/api/v1/tokens') {
    return json(response, 200, { id: 'x2Fa', line: 'dllm join dllm1.192-168-1-20.5555.r4cZ8mYp1kVtq0uXw7bJd3NfHs6LeAg2' })
  }
  if (path === '/tokenize') {
    const strs = ((await bodyOf(request)).prompt.match(/\s?\w+|\s?[^\w\s]+|\s+/g) ?? [])
    const tokens = strs.map((one) => [...one].reduce((sum, c) => (sum * 31 + c.codePointAt(0)) % 151000, 7))
    return json(response, 200, { tokens, token_strs: strs, count: tokens.length })
  }
  if (path === '/v1/chat/completions' || path === '/v1/completions') {
    const asked = await bodyOf(request)
    const isChat = path.includes('chat')
    if (isChat && !chatTemplate) {
      return refuse(response, 400, 'The model has no chat template. Use /v1/completions, or a model that has one.', 'no_chat_template')
    }
    return answerTo(asked, isChat, traced(world), request, response)
  }
  if (request.method === 'DELETE' || path.endsWith('/cancel')) return json(response, 200, {})
  return refuse(response, 404, `There is nothing at '${path}'.`)
}

createServer((request, response) => {
  const path = new URL(request.url, 'http://mock').pathname
  const handled = /^\/(api|v1|mock|tokenize)/.test(path) ? api(request, response, path) : file(response, path)
  handled.catch((error) => {
    console.error(error)
    response.destroy()
  })
}).listen(Number(process.argv[2] ?? 8765), '127.0.0.1', function () {
  console.log(`http://127.0.0.1:${this.address().port}/#key=admin-key`)
})
