import { type Conversation, NO_PARAMS, type Params } from './tree'

interface Field {
  name: keyof Params
  label: string
  min: number
  max: number
  step: number | 'any'
}

const FIELDS: Field[] = [
  { name: 'temperature', label: 'Temperature', min: 0, max: 2, step: 0.1 },
  { name: 'top_p', label: 'Top p', min: 0, max: 1, step: 0.05 },
  { name: 'max_tokens', label: 'Most tokens', min: 1, max: 1_000_000, step: 1 },
  { name: 'seed', label: 'Seed', min: 0, max: 2 ** 31, step: 1 },
]

interface Props {
  conversation: Conversation
  onChange: (how: (conversation: Conversation) => Conversation) => void
}

export function Settings({ conversation, onChange }: Props) {
  const { params, system } = conversation
  const set = (name: keyof Params, value: string) =>
    onChange((one) => ({ ...one, params: { ...one.params, [name]: value } }))
  const changed = FIELDS.filter((field) => params[field.name] !== '')
  const summary = [
    ...changed.map((field) => `${field.label.toLowerCase()} ${params[field.name]}`),
    ...(system.trim() ? ['a system prompt'] : []),
  ]
  return (
    <details className="settings">
      <summary>How to answer{summary.length > 0 ? `: ${summary.join(', ')}` : ''}</summary>
      <label htmlFor="system">System prompt</label>
      <textarea
        id="system"
        rows={3}
        value={system}
        placeholder="What the model is told before the conversation"
        onChange={(event) => onChange((one) => ({ ...one, system: event.target.value }))}
      />
      <div className="fields">
        {FIELDS.map(({ name, label, ...limits }) => (
          <span key={name}>
            <label htmlFor={name}>{label}</label>
            <input
              id={name}
              type="number"
              inputMode="decimal"
              placeholder="as the model says"
              value={params[name]}
              onChange={(event) => set(name, event.target.value)}
              {...limits}
            />
          </span>
        ))}
      </div>
      <button onClick={() => onChange((one) => ({ ...one, params: NO_PARAMS, system: '' }))}>Reset</button>
    </details>
  )
}
