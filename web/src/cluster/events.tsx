import type { Live } from '../api/live'
import { ago } from '../parts/format'

const SHOWN = 60

export function Events({ live }: { live: Live }) {
  const shown = live.happenings.slice(-SHOWN).reverse()
  return (
    <section className="card timeline" aria-labelledby="events-title">
      <h2 id="events-title">What happened</h2>
      {shown.length === 0 && <p className="quiet">Nothing yet.</p>}
      <ol tabIndex={0} aria-label="Events, newest first">
        {shown.map((one) => (
          <li key={one.number} className={one.level}>
            <span className={one.worker ? `dot paint m${live.colours[one.worker] ?? 0}` : 'dot'} />
            <span className="text">
              {one.level !== 'info' && <span className="level">{one.level}</span>}
              {one.text}
              {one.times > 1 && <span className="times"> × {one.times}</span>}
            </span>
            <time dateTime={new Date(one.at).toISOString()}>{ago(live.at - one.at)}</time>
          </li>
        ))}
      </ol>
    </section>
  )
}
