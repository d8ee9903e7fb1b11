/** Numbers as people read them. */

import type { LayerRange } from '../api/types'

const NOT_KNOWN = '–'

function digits(value: number): string {
  if (value >= 100) return value.toFixed(0)
  if (value >= 10) return value.toFixed(1).replace(/\.0$/, '')
  return value.toFixed(2).replace(/0$/, '').replace(/\.0$/, '')
}

export function seconds(value: number | null | undefined): string {
  if (value === null || value === undefined) return NOT_KNOWN
  if (value === 0) return '0 ms'
  if (value < 0.001) return `${digits(value * 1e6)} µs`
  if (value < 1) return `${digits(value * 1e3)} ms`
  if (value < 90) return `${digits(value)} s`
  return `${Math.round(value / 60)} min`
}

function sized(value: number, step: number, units: string[]): string {
  let unit = 0
  while (value >= step * 0.9995 && unit < units.length - 1) {
    value /= step
    unit += 1
  }
  return `${unit === 0 ? Math.round(value) : digits(value)} ${units[unit]}`
}

export function bytes(value: number | null | undefined): string {
  if (value === null || value === undefined) return NOT_KNOWN
  return sized(value, 1024, ['B', 'KiB', 'MiB', 'GiB', 'TiB'])
}

export function perSecond(value: number | null | undefined): string {
  if (value === null || value === undefined) return NOT_KNOWN
  return `${sized(value, 1000, ['B', 'KB', 'MB', 'GB', 'TB'])}/s`
}

export function number(value: number | null | undefined): string {
  return value === null || value === undefined ? NOT_KNOWN : value.toLocaleString('en')
}

export function rate(value: number | null | undefined): string {
  return value === null || value === undefined ? NOT_KNOWN : digits(value)
}

export function percent(value: number | null | undefined): string {
  return value === null || value === undefined ? NOT_KNOWN : `${Math.round(value * 100)} %`
}

/** Layers of both stacks, numbered as one list, are told by the stack that each is of. */
export function layers({ start, stop }: LayerRange, encoderLayers = 0): string {
  if (encoderLayers === 0) return stop - start === 1 ? `${stop}` : `${start + 1}–${stop}`
  const parts = []
  if (start < encoderLayers) {
    parts.push(`encoder ${layers({ start, stop: Math.min(stop, encoderLayers) })}`)
  }
  if (stop > encoderLayers) {
    const first = Math.max(0, start - encoderLayers)
    parts.push(`decoder ${layers({ start: first, stop: stop - encoderLayers })}`)
  }
  return parts.join(', ')
}

export function count(value: number, one: string, many = `${one}s`): string {
  return `${number(value)} ${value === 1 ? one : many}`
}

export function ago(ms: number): string {
  const s = Math.max(0, ms / 1000)
  if (s < 2) return 'just now'
  if (s < 60) return `${Math.floor(s)} s ago`
  if (s < 3600) return `${Math.floor(s / 60)} min ago`
  if (s < 86400) return `${Math.floor(s / 3600)} h ago`
  return `${Math.floor(s / 86400)} d ago`
}

/** Hundreds of nodes are named alike: the middle of a long name says least. */
export function short(name: string, chars: number): string {
  if (name.length <= chars) return name
  const tail = Math.floor((chars - 1) / 3)
  return `${name.slice(0, chars - 1 - tail)}…${name.slice(name.length - tail)}`
}
