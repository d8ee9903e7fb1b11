/** What stands around every view: the header, and the banner while nobody answers. */

import { useEffect, useState } from 'react'
import type { Connection, Live } from './api/live'
import type { Me } from './api/types'
import { ago } from './parts/format'
import { chooseTheme, chosenTheme, type Theme } from './parts/theme'

export const VIEWS = ['cluster', 'chat', 'learn'] as const
export type ViewName = (typeof VIEWS)[number]

export const TITLES: Record<ViewName, string> = { cluster: 'Cluster', chat: 'Chat', learn: 'Learn' }

const STATES: Record<Connection, string> = {
  connecting: 'connecting',
  live: 'live',
  polling: 'asking every 2 s',
  away: 'away',
}

export function Logo() {
  return (
    <svg className="logo" viewBox="0 0 26 22" width="26" height="22" aria-hidden="true">
      <rect className="paint m0" x="0" y="3" width="5" height="16" rx="2.2" />
      <rect className="paint m1" x="7" y="3" width="5" height="16" rx="2.2" />
      <rect className="paint m1" x="14" y="3" width="5" height="16" rx="2.2" />
      <rect className="paint m2" x="21" y="3" width="5" height="16" rx="2.2" />
    </svg>
  )
}

interface HeaderProps {
  live: Live
  me: Me | null
  view: ViewName
  onSignOut: (() => void) | null
}

export function Header({ live, me, view, onSignOut }: HeaderProps) {
  const model = live.status?.model ?? me?.model ?? ''
  return (
    <header className="top">
      <div className="brand">
        <Logo />
        <span>
          <h1>distributed_llm</h1>
          <span className="model" title={model}>
            {model.split('/').at(-1)}
          </span>
        </span>
      </div>
      <nav aria-label="Views">
        {VIEWS.map((name) => (
          <a key={name} href={`#${name}`} aria-current={name === view ? 'page' : undefined}>
            {TITLES[name]}
          </a>
        ))}
      </nav>
      <div className="side">
        <span className={`connection ${live.connection}`} title={STATES[live.connection]}>
          <span className="lamp" />
          <span>{STATES[live.connection]}</span>
        </span>
        <ThemeButton />
        {me && me.name && (
          <span className="me" title={`This key's role is ${me.role}`}>
            {me.name}
          </span>
        )}
        {onSignOut && (
          <button className="plain" onClick={onSignOut}>
            Forget key
          </button>
        )}
      </div>
    </header>
  )
}

const NEXT: Record<Theme, Theme> = { system: 'dark', dark: 'light', light: 'system' }
const GLYPHS: Record<Theme, string> = { system: '◐', dark: '●', light: '○' }

function ThemeButton() {
  const [theme, setTheme] = useState(chosenTheme)
  const next = NEXT[theme]
  return (
    <button
      className="plain glyph"
      aria-label={`Colours: ${theme}. Change to ${next}`}
      title={`Colours: ${theme}`}
      onClick={() => {
        chooseTheme(next)
        setTheme(next)
      }}
    >
      {GLYPHS[theme]}
    </button>
  )
}

export function Banner({ live }: { live: Live }) {
  const [, tick] = useState(0)
  const isAway = live.connection === 'away'
  useEffect(() => {
    if (!isAway) return
    const timer = setInterval(() => tick((number) => number + 1), 1000)
    return () => clearInterval(timer)
  }, [isAway])
  if (!isAway) return null
  return (
    <section className="banner" aria-label="The connection">
      <span role="alert">
        <strong>Nobody answers.</strong> {live.trouble}
      </span>{' '}
      {live.status && <>What you see was true {ago(Date.now() - live.at)}. </>}
      The page goes on trying.
    </section>
  )
}
