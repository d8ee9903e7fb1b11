/** Server-sent events read with `fetch`: `EventSource` cannot send a key. */

export interface ServerEvent {
  event: string
  data: string
}

const MAX_EVENT_CHARS = 4_000_000

/** Takes text as it comes, and returns the events that are complete. */
export class EventParser {
  #rest = ''
  #event = ''
  #data: string[] = []
  #size = 0

  feed(text: string): ServerEvent[] {
    const found: ServerEvent[] = []
    const all = this.#rest + text
    // A carriage return at the end may be half of a line end.
    const end = all.endsWith('\r') ? all.length - 1 : all.length
    const lines = all.slice(0, end).split(/\r\n|\n|\r/)
    this.#rest = (lines.pop() ?? '') + all.slice(end)
    if (this.#rest.length > MAX_EVENT_CHARS) throw new Error('an event is too long')
    for (const line of lines) {
      const event = this.#line(line)
      if (event) found.push(event)
    }
    return found
  }

  #line(line: string): ServerEvent | null {
    if (line === '') {
      const event = { event: this.#event || 'message', data: this.#data.join('\n') }
      const told = this.#data.length > 0
      this.#event = ''
      this.#data = []
      this.#size = 0
      return told ? event : null
    }
    const colon = line.indexOf(':')
    if (colon === 0) return null // a comment
    const field = colon < 0 ? line : line.slice(0, colon)
    const value = colon < 0 ? '' : line.slice(colon + 1).replace(/^ /, '')
    if (field === 'event') this.#event = value
    if (field === 'data') {
      this.#size += value.length
      if (this.#size > MAX_EVENT_CHARS) throw new Error('an event is too long')
      this.#data.push(value)
    }
    return null
  }
}

/** Yields the events of a response; ends when it ends. */
export async function* eventsOf(response: Response): AsyncGenerator<ServerEvent> {
  if (!response.body) return
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader()
  const parser = new EventParser()
  try {
    for (;;) {
      const { done, value } = await reader.read()
      if (done) return
      yield* parser.feed(value)
    }
  } finally {
    await reader.cancel().catch(() => {})
  }
}
