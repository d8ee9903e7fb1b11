import type { Live, Sample } from '../api/live'
import * as say from '../parts/format'
import { quantile, recent, room } from './measures'

export function Figures({ live }: { live: Live }) {
  const status = live.status!
  const firstToken = recent(live.samples, 'firstToken')
  const between = recent(live.samples, 'betweenTokens')
  const kv = status.kv_tokens > 0 ? status.kv_tokens_used / status.kv_tokens : null
  return (
    <section className="figures" aria-label="Figures">
      <Figure name="Tokens per second" value={say.rate(live.samples.at(-1)?.rate ?? 0)}>
        <Spark samples={live.samples} />
      </Figure>
      <Figure name="First token" value={say.seconds(quantile(firstToken, 0.5))}>
        99 % within {say.seconds(quantile(firstToken, 0.99))}
      </Figure>
      <Figure name="Between tokens" value={say.seconds(quantile(between, 0.5))}>
        99 % within {say.seconds(quantile(between, 0.99))}
      </Figure>
      <Figure name="Answers" value={say.number(status.answers_running)}>
        running, {say.number(status.answers_waiting)} waiting
      </Figure>
      <Figure name={status.most_texts ? 'Memory of texts' : 'KV cache'} value={say.percent(kv)}>
        of {room(status)}
      </Figure>
      <Figure name="Finished" value={say.number(status.requests_finished)}>
        {say.number(status.requests_failed)} failed, {say.number(status.requests_cancelled)} cancelled
      </Figure>
    </section>
  )
}

function Figure(props: { name: string; value: string; children: React.ReactNode }) {
  return (
    <div className="figure card">
      <span className="name">{props.name}</span>
      <span className="value">{props.value}</span>
      <span className="more">{props.children}</span>
    </div>
  )
}

const WIDTH = 120
const HEIGHT = 22

function Spark({ samples }: { samples: Sample[] }) {
  const shown = samples.slice(-60)
  const step = WIDTH / (Math.max(20, shown.length) - 1)
  const most = Math.max(1, ...shown.map((one) => one.rate))
  const points = shown.map((one, i) => {
    const x = WIDTH - (shown.length - 1 - i) * step
    return `${x.toFixed(1)},${(HEIGHT - 2 - (one.rate / most) * (HEIGHT - 4)).toFixed(1)}`
  })
  return (
    <svg className="spark" viewBox={`0 0 ${WIDTH} ${HEIGHT}`} preserveAspectRatio="none" aria-hidden="true">
      <polyline points={points.join(' ')} />
    </svg>
  )
}
