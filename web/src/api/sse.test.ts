import { describe, expect, it } from 'vitest'
import { EventParser } from './sse'

const STREAM = ': hello\n\nevent: status\r\ndata: {"a":\r\ndata: 1}\r\n\r\ndata: [DONE]\n\nevent: x\n\n'

describe('events of a stream', () => {
  it('are the same however the text is cut', () => {
    const whole = new EventParser().feed(STREAM)
    expect(whole).toEqual([
      { event: 'status', data: '{"a":\n1}' },
      { event: 'message', data: '[DONE]' },
    ])
    for (let cut = 1; cut < STREAM.length; cut++) {
      const parser = new EventParser()
      expect([...parser.feed(STREAM.slice(0, cut)), ...parser.feed(STREAM.slice(cut))]).toEqual(whole)
    }
    const parser = new EventParser()
    expect([...STREAM].flatMap((letter) => parser.feed(letter))).toEqual(whole)
  })

  it('are bounded', () => {
    const parser = new EventParser()
    expect(() => {
      for (let i = 0; i < 100; i++) parser.feed('data: ' + 'x'.repeat(100_000) + '\n')
    }).toThrow('too long')
    expect(() => new EventParser().feed('x'.repeat(5_000_000))).toThrow('too long')
  })
})
