import { useEffect, useState } from 'react'
import { askJson, messageOf } from '../api/http'
import type { Live } from '../api/live'
import type { RequestStatus } from '../api/types'
import * as say from '../parts/format'

const SHOWN = 12
const ENDED = new Set(['finished', 'failed', 'cancelled'])

export function Requests({ live }: { live: Live }) {
  const [requests, setRequests] = useState<RequestStatus[]>([])
  const [trouble, setTrouble] = useState('')
  // Asked again whenever a picture of the cluster comes: about once a second.
  useEffect(() => {
    const controller = new AbortController()
    askJson<{ requests?: RequestStatus[] }>('/api/v1/requests', { signal: controller.signal }).then(
      (told) => setRequests(told.requests ?? []),
      () => {},
    )
    return () => controller.abort()
  }, [live.at])
  const cancel = async (id: string) => {
    setTrouble('')
    try {
      await askJson(`/api/v1/requests/${encodeURIComponent(id)}/cancel`, { method: 'POST' })
      setRequests((all) => all.filter((one) => one.id !== id))
    } catch (error) {
      setTrouble(messageOf(error))
    }
  }
  return (
    <section className="card" aria-labelledby="requests-title">
      <h2 id="requests-title">Requests</h2>
      {requests.length === 0 && <p className="quiet">None yet.</p>}
      {trouble && (
        <p className="trouble" role="alert">
          {trouble}
        </p>
      )}
      {requests.length > 0 && (
        <div className="scroll" tabIndex={0} role="group" aria-labelledby="requests-title">
          <table>
            <thead>
              <tr>
                <th scope="col">Request</th>
                <th scope="col">Path</th>
                <th scope="col">Key</th>
                <th scope="col">State</th>
                <th scope="col">Since</th>
                <th scope="col" className="right">
                  Prompt
                </th>
                <th scope="col" className="right">
                  Answer
                </th>
                <th scope="col" className="right">
                  Tokens/s
                </th>
                <td />
              </tr>
            </thead>
            <tbody>
              {requests.slice(0, SHOWN).map((one) => (
                <tr key={one.id} className={ENDED.has(one.state ?? '') ? 'ended' : ''}>
                  <td>
                    <code>{say.short(one.id, 20)}</code>
                  </td>
                  <td>{one.path ?? '–'}</td>
                  <td>{one.name || '–'}</td>
                  <td>{one.state ?? '–'}</td>
                  <td>{one.started_at ? say.ago(live.at - one.started_at * 1000) : '–'}</td>
                  <td className="right">{say.number(one.prompt_tokens || null)}</td>
                  <td className="right">{say.number(one.completion_tokens)}</td>
                  <td className="right">{say.rate(one.tokens_per_s)}</td>
                  <td className="right">
                    {!ENDED.has(one.state ?? '') && (
                      <button onClick={() => cancel(one.id)} aria-label={`Cancel request ${one.id}`}>
                        Cancel
                      </button>
                    )}
                  </td>
                </tr>
              ))}
            </tbody>
          </table>
        </div>
      )}
      {requests.length > SHOWN && <p className="quiet">and {requests.length - SHOWN} earlier ones</p>}
    </section>
  )
}
