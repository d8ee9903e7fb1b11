/** What only an admin's key may do: invite machines, and see and remove who may connect. */

import { useCallback, useEffect, useState } from 'react'
import { askJson, messageOf } from '../api/http'
import type { Live } from '../api/live'
import type { Members } from '../api/types'
import { QrCode } from '../parts/qr'
import * as say from '../parts/format'

const EXPIRES_S = 3600

export default function Admin({ live }: { live: Live }) {
  const [members, setMembers] = useState<Members | null>(null)
  const [trouble, setTrouble] = useState('')
  const look = useCallback(() => {
    askJson<Members>('/api/v1/members').then(
      (told) => (setMembers(told), setTrouble('')),
      (error: unknown) => setTrouble(messageOf(error)),
    )
  }, [])
  useEffect(look, [look, live.status?.workers.length])
  const remove = async (path: string) => {
    try {
      await askJson(path, { method: 'DELETE' })
      look()
    } catch (error) {
      setTrouble(messageOf(error))
    }
  }
  return (
    <div className="pair">
      <Join onMade={look} insecure={live.status?.insecure ?? false} />
      <section className="card" aria-labelledby="members-title">
        <h2 id="members-title">Keys</h2>
        {trouble && <p className="trouble">{trouble}</p>}
        {members && (
          <ul className="members">
            {members.machines.map((one) => (
              <Member
                key={one.name}
                name={one.name}
                text={`${one.role}${one.sessions > 0 ? ', connected' : ''}${one.quarantined_s ? ', in quarantine' : ''}`}
                verb="Remove"
                onRemove={() => remove(`/api/v1/machines/${encodeURIComponent(one.name)}`)}
              />
            ))}
            {members.tokens.map((one) => (
              <Member
                key={one.id}
                name={`join line ${one.id}`}
                text={`${one.role}, ${one.uses_left === null ? 'any number of uses' : say.count(one.uses_left, 'use')} left`}
                verb="Revoke"
                onRemove={() => remove(`/api/v1/tokens/${encodeURIComponent(one.id)}`)}
              />
            ))}
            {members.machines.length + members.tokens.length === 0 && (
              <li className="quiet">None: whoever reaches the port may do everything.</li>
            )}
          </ul>
        )}
      </section>
    </div>
  )
}

interface MemberProps {
  name: string
  text: string
  verb: string
  onRemove: () => void
}

function Member({ name, text, verb, onRemove }: MemberProps) {
  const [sure, setSure] = useState(false)
  return (
    <li>
      <span>
        <strong>{name}</strong> <span className="quiet">{text}</span>
      </span>
      {sure ? (
        <span className="buttons">
          <button className="danger" autoFocus onClick={onRemove}>
            {verb}
          </button>
          <button onClick={() => setSure(false)}>No</button>
        </span>
      ) : (
        <button onClick={() => setSure(true)} aria-label={`${verb} ${name}`}>
          {verb}
        </button>
      )}
    </li>
  )
}

function Join({ onMade, insecure }: { onMade: () => void; insecure: boolean }) {
  const [role, setRole] = useState('worker')
  const [line, setLine] = useState('')
  const [copied, setCopied] = useState(false)
  const [trouble, setTrouble] = useState('')
  const make = async () => {
    setTrouble('')
    try {
      const made = await askJson<{ line: string }>('/api/v1/tokens', {
        body: { role, uses: 1, expires_s: EXPIRES_S },
      })
      setLine(made.line)
      setCopied(false)
      onMade()
    } catch (error) {
      setTrouble(messageOf(error))
    }
  }
  const copy = () => {
    navigator.clipboard?.writeText(line).then(
      () => setCopied(true),
      () => setTrouble('The browser did not let the page copy it: select the line instead.'),
    )
  }
  return (
    <section className="card join" aria-labelledby="join-title">
      <h2 id="join-title">Add a machine</h2>
      {insecure && <p className="quiet">This cluster runs without keys: anyone may join it.</p>}
      <p className="buttons">
        <label htmlFor="role">Role</label>
        <select id="role" value={role} onChange={(event) => setRole(event.target.value)}>
          <option value="worker">worker: computes layers</option>
          <option value="client">client: asks for answers</option>
          <option value="admin">admin: may do everything</option>
        </select>
        <button className="primary" onClick={make}>
          Make a join line
        </button>
      </p>
      {trouble && (
        <p className="trouble" role="alert">
          {trouble}
        </p>
      )}
      {line && (
        <div className="invitation">
          <QrCode text={line} />
          <div>
            <p>Run this on the machine, within an hour. It works once.</p>
            <code className="line" tabIndex={0}>
              {line}
            </code>
            <button onClick={copy}>{copied ? 'Copied' : 'Copy'}</button>
          </div>
        </div>
      )}
    </section>
  )
}
