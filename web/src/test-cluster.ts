/** A cluster for tests. */

import type { ClusterStatus, EventStatus, PipelineStatus, WorkerStatus } from './api/types'

export function worker(name: string, start?: number, stop?: number): WorkerStatus {
  const layers = start === undefined || stop === undefined ? null : { start, stop }
  return {
    name,
    state: layers ? 'serving' : 'idle',
    note: '',
    layers,
    next_layers: null,
    link: '',
    capabilities: {
      device: 'cpu',
      device_name: 'CPU',
      platform: 'Linux',
      memory_bytes: 8 * 2 ** 30,
      cores: 4,
      threads: 4,
      memory_bandwidth_bytes_per_s: 1e10,
      flops_per_s: 1e11,
    },
    memory_used_bytes: 2 ** 30,
    kv_bytes: 0,
    weight_bytes: 2 ** 30,
    tasks_done: 1,
    compute_s: 1,
    seconds_per_token: 0.01,
    prediction_error: null,
    gain: null,
    advice: '',
    last_heard_s: 0.1,
  }
}

export function pipeline(workers: WorkerStatus[], more: Partial<PipelineStatus> = {}): PipelineStatus {
  const serving = workers.filter((one) => one.layers !== null)
  return {
    epoch: 1,
    lineage: 1,
    state: 'serving',
    stages: serving.map((one) => ({
      worker: one.name,
      layers: one.layers!,
      ready: true,
      step_s: one.seconds_per_token,
      predicted_s: 0.01,
      queued_s: 0,
    })),
    links: serving.slice(1).map((one, i) => ({
      sender: serving[i]!.name,
      receiver: one.name,
      how: 'direct',
      latency_s: 0.001,
      bytes_per_s: 1e8,
    })),
    kv_tokens: 1000,
    kv_tokens_used: 100,
    answers_running: 1,
    steps_in_flight: 1,
    round_trip_s: 0.05,
    outside_s: 0.01,
    step_tokens: 1,
    ...more,
  }
}

export function cluster(workers: WorkerStatus[], more: Partial<ClusterStatus> = {}): ClusterStatus {
  return {
    model: 'tiny',
    state: 'serving',
    note: '',
    epoch: 1,
    num_layers: 8,
    context_length: 512,
    kv_tokens: 1000,
    kv_tokens_used: 100,
    kv_tokens_cached: 0,
    prefix_hit_tokens: 0,
    preemptions: 0,
    moves: 0,
    move_stall_s: 0,
    answers_running: 1,
    answers_waiting: 0,
    requests_finished: 0,
    requests_cancelled: 0,
    requests_failed: 0,
    tokens_generated: 100,
    workers,
    events: [],
    pipelines: [pipeline(workers)],
    ...more,
  }
}

export function event(number: number, text: string, more: Partial<EventStatus> = {}): EventStatus {
  return { number, kind: 'made_up', level: 'info', text, age_s: 0, ...more }
}
