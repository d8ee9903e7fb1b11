import { type FormEvent, useState } from 'react'
import { Logo } from './shell'

export function SignIn({ why, onKey }: { why: string; onKey: (key: string) => void }) {
  const [key, setKey] = useState('')
  const submit = (event: FormEvent) => {
    event.preventDefault()
    if (key.trim()) onKey(key.trim())
  }
  return (
    <main className="signin">
      <form onSubmit={submit} className="card">
        <h1>
          <Logo /> distributed_llm
        </h1>
        <label htmlFor="key">Key</label>
        <input
          id="key"
          type="password"
          autoComplete="current-password"
          spellCheck={false}
          value={key}
          aria-describedby="keyhelp"
          onChange={(event) => setKey(event.target.value)}
          autoFocus
        />
        <p id="keyhelp" className="quiet">
          <code>dllm up</code> prints it. It stays in this tab.
        </p>
        {why && (
          <p className="trouble" role="alert">
            {why}
          </p>
        )}
        <button className="primary" disabled={!key.trim()}>
          Open
        </button>
      </form>
    </main>
  )
}
