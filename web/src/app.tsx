import { lazy, Suspense, useCallback, useEffect, useReducer, useState } from 'react'
import { follow } from './api/follow'
import { ApiError, askJson, messageOf } from './api/http'
import { forgetKey, keepKey, takeKey, theKey } from './api/key'
import { hear, NOTHING } from './api/live'
import type { Me } from './api/types'
import { ClusterView } from './cluster/view'
import { Banner, Header, TITLES, type ViewName, VIEWS } from './shell'
import { SignIn } from './sign-in'

const ChatView = lazy(() => import('./chat/view'))
const LearnView = lazy(() => import('./learn/view'))

function viewInHash(): ViewName {
  const name = location.hash.slice(1)
  return VIEWS.find((view) => view === name) ?? 'cluster'
}

function useView(onKey: () => void): ViewName {
  const [view, setView] = useState(viewInHash)
  useEffect(() => {
    const changed = () => {
      if (location.hash.includes('key=')) {
        takeKey()
        onKey()
      }
      setView(viewInHash())
    }
    addEventListener('hashchange', changed)
    return () => removeEventListener('hashchange', changed)
  }, [onKey])
  return view
}

export function App() {
  const [live, tell] = useReducer(hear, NOTHING)
  const [me, setMe] = useState<Me | null>(null)
  const [attempt, setAttempt] = useState(0)
  const [refusal, setRefusal] = useState<string | null>(null)
  const again = useCallback(() => {
    setRefusal(null)
    setAttempt((number) => number + 1)
  }, [])
  const view = useView(again)
  useEffect(() => {
    document.title = `${TITLES[view]} · distributed_llm`
  }, [view])

  useEffect(() => {
    if (refusal !== null) return
    const controller = new AbortController()
    void follow({ heard: tell, refused: setRefusal }, controller.signal)
    return () => controller.abort()
  }, [attempt, refusal])

  const reached = live.connection === 'live' || live.connection === 'polling'
  useEffect(() => {
    if (refusal !== null || !reached) return
    const controller = new AbortController()
    askJson<Me>('/api/v1/me', { signal: controller.signal }).then(setMe, (error: unknown) => {
      if (error instanceof ApiError && error.status === 401) setRefusal(messageOf(error))
    })
    return () => controller.abort()
  }, [attempt, refusal, reached])

  // An answer goes on while one looks at the cluster that computes it.
  const [chatted, setChatted] = useState(view === 'chat')
  if (view === 'chat' && !chatted) setChatted(true)

  const signIn = (key: string) => {
    keepKey(key)
    again()
  }
  const signOut = () => {
    forgetKey()
    setMe(null)
    setRefusal('')
  }
  const refused = useCallback((why: string) => setRefusal(why), [])

  if (refusal !== null) return <SignIn why={theKey() === null ? '' : refusal} onKey={signIn} />
  return (
    <>
      <a className="skip" href="#main" onClick={skip}>
        To the content
      </a>
      <Header live={live} me={me} view={view} onSignOut={theKey() === null ? null : signOut} />
      <Banner live={live} />
      <main id="main" tabIndex={-1}>
        {view === 'cluster' && <ClusterView live={live} me={me} />}
        <Suspense fallback={<p className="quiet">Loading …</p>}>
          {chatted && (
            <div hidden={view !== 'chat'}>
              <ChatView live={live} me={me} onRefused={refused} />
            </div>
          )}
          {view === 'learn' && <LearnView live={live} me={me} />}
        </Suspense>
      </main>
    </>
  )
}

function skip(event: React.MouseEvent) {
  event.preventDefault()
  document.getElementById('main')?.focus()
}
