/** What the API tells, as JSON. Times are seconds, ranges of layers half-open and from 0. */

export interface LayerRange {
  start: number
  stop: number
}

export interface Capabilities {
  device: string
  device_name: string
  platform: string
  memory_bytes: number
  cores: number
  threads: number
  memory_bandwidth_bytes_per_s: number
  flops_per_s: number
}

export interface FetchProgress {
  here_bytes: number
  total_bytes: number
  bytes_per_s: number
  doing: string
}

export interface WorkerStatus {
  name: string
  state: 'idle' | 'loading' | 'serving' | 'leaving' | 'unfit'
  note: string
  layers: LayerRange | null
  next_layers: LayerRange | null
  link: 'direct' | 'relayed' | ''
  capabilities: Capabilities
  memory_used_bytes: number
  kv_bytes: number
  kv_used_bytes?: number
  kv_room_bytes?: number
  weight_bytes: number
  tasks_done: number
  compute_s: number
  seconds_per_token: number | null
  prediction_error: number | null
  gain: number | null
  advice: string
  last_heard_s: number
  fetch?: FetchProgress | null
}

export interface StageStatus {
  worker: string
  layers: LayerRange
  ready: boolean
  step_s?: number | null
  predicted_s?: number | null
  queued_s?: number | null
  compute_s?: number
}

export interface LinkStatus {
  sender: string
  receiver: string
  how: 'direct' | 'relayed' | ''
  latency_s?: number | null
  bytes_per_s?: number | null
  bytes_sent?: number
}

export interface HeldLayers {
  worker: string
  layers: LayerRange
}

export interface MoveStatus {
  epoch: number
  phase: string
  why: string
  before: HeldLayers[]
  after: HeldLayers[]
  copies: boolean
  standstill_s: number
  bytes_sent: number
  age_s: number
}

export interface Forecast {
  tokens_per_s: number
  full_tokens_per_s: number
  alone_tokens_per_s: number
  better?: HeldLayers[]
  better_tokens_per_s?: number | null
}

export interface PipelineStatus {
  epoch: number
  lineage: number
  state: 'loading' | 'ready' | 'serving' | 'paused'
  stages: StageStatus[]
  links: LinkStatus[]
  move?: MoveStatus | null
  kv_tokens: number
  kv_tokens_used?: number
  kv_tokens_cached?: number
  answers_running?: number
  answers_decoding?: number
  steps_in_flight?: number
  depth?: number
  round_trip_s?: number | null
  outside_s?: number | null
  step_tokens?: number | null
  slowest?: number | null
  bubble_ratio?: number | null
  forecast?: Forecast | null
}

export interface Histogram {
  bounds_s: number[]
  counts: number[]
  sum_s: number
}

export interface Latencies {
  queue: Histogram
  first_token: Histogram
  between_tokens: Histogram
  whole: Histogram
}

export interface EventStatus {
  number: number
  kind: string
  level: 'info' | 'warning' | 'error'
  text: string
  times?: number
  age_s: number
  worker?: string
  epoch?: number
}

export interface ClusterStatus {
  model: string
  state: 'waiting' | 'loading' | 'serving'
  note: string
  epoch: number
  num_layers: number
  /** How many of the layers, the first, are an encoder's. */
  encoder_layers?: number
  context_length: number
  kv_tokens: number
  kv_tokens_used: number
  kv_tokens_cached: number
  /** Texts that there is room for where no layer keeps positions: `kv_tokens` are bytes then. */
  most_texts?: number
  prefix_hit_tokens: number
  preemptions: number
  moves: number
  move_stall_s: number
  answers_running: number
  answers_waiting: number
  requests_finished: number
  requests_cancelled: number
  requests_failed: number
  tokens_generated: number
  workers: WorkerStatus[]
  events: EventStatus[]
  pipelines?: PipelineStatus[]
  latencies?: Latencies
  insecure?: boolean
  quarantined?: string[]
}

export interface Me {
  name: string
  role: string
  model: string
}

export interface RequestStatus {
  id: string
  path?: string
  state?: string
  /** Of the key that asked. */
  name?: string
  started_at?: number
  prompt_tokens?: number
  completion_tokens?: number
  tokens_per_s?: number | null
}

export interface MachineStatus {
  name: string
  role: string
  enrolled_at: number
  sessions: number
  quarantined_s: number | null
}

export interface TokenStatus {
  id: string
  role: string
  created_at: number
  uses_left: number | null
  expires_at: number | null
}

export interface Members {
  machines: MachineStatus[]
  tokens: TokenStatus[]
  addresses?: string[]
}

export interface StageTiming {
  worker: string
  layers: LayerRange
  tasks: number
  compute_s: number
}

/** How long an answer took, and where. */
export interface Timings {
  queued_s: number
  first_token_s: number
  decode_s: number
  stages: StageTiming[]
}

/** What one stage did for one step; fields that a server does not know are absent. */
export interface Hop {
  worker: string
  layers?: LayerRange
  tokens?: number
  shape?: number[]
  dtype?: string
  /** What came in. */
  bytes?: number
  queued_s?: number
  compute_s?: number
  link_s?: number | null
}
