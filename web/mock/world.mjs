/** A made-up cluster whose machines die and move layers when asked to, for looking at the page. */

const GIB = 2 ** 30
const MODEL = 'Qwen/Qwen3-14B'
const LAYERS = 40
const LAYER_BYTES = 0.66 * GIB

const MACHINES = {
  'studio-mac': { device: 'mps', device_name: 'Apple M2 Max', memory: 22 * GIB, step: 0.00098 },
  'gaming-pc': { device: 'cuda:0', device_name: 'NVIDIA RTX 3060', memory: 11.2 * GIB, step: 0.00081 },
  'old-laptop': { device: 'cpu', device_name: 'Intel i7-8650U', memory: 9 * GIB, step: 0.0042 },
  'attic-server': { device: 'cpu', device_name: 'AMD EPYC 7302', memory: 40 * GIB, step: 0.0026 },
}

const LINKS = {
  'studio-mac>gaming-pc': [0.00042, 117e6],
  'gaming-pc>old-laptop': [0.0031, 21e6],
  'studio-mac>old-laptop': [0.0036, 18e6],
  'gaming-pc>attic-server': [0.00051, 114e6],
  'studio-mac>attic-server': [0.00047, 116e6],
}

const BOUNDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10]

const held = (worker, start, stop) => ({ worker, layers: { start, stop } })
const BEGINNING = [held('studio-mac', 0, 21), held('gaming-pc', 21, 34), held('old-laptop', 34, 40)]
const WITHOUT_PC = [held('studio-mac', 0, 24), held('attic-server', 24, 40)]
const BETTER = [held('studio-mac', 0, 20), held('gaming-pc', 20, 34), held('attic-server', 34, 40)]

const histogram = () => ({ bounds_s: BOUNDS, counts: new Array(BOUNDS.length + 1).fill(0), sum_s: 0 })

function record(h, value) {
  const at = BOUNDS.findIndex((bound) => value <= bound)
  h.counts[at < 0 ? BOUNDS.length : at] += 1
  h.sum_s += value
}

export class World {
  constructor() {
    this.listeners = new Set()
    this.timers = new Set()
    this.reset()
    setInterval(() => this.work(0.25), 250).unref()
  }

  reset() {
    for (const timer of this.timers ?? []) clearTimeout(timer)
    this.timers = new Set()
    this.plan = structuredClone(BEGINNING)
    this.epoch = 3
    this.here = new Set(['studio-mac', 'gaming-pc', 'old-laptop', 'attic-server'])
    this.leaving = new Set()
    this.loading = new Set()
    this.fetched = 1
    this.planless = false
    this.state = 'serving'
    this.move = null
    this.away = false
    this.events = []
    this.number = 0
    this.tokens = 48213
    this.finished = 611
    this.cancelled = 14
    this.moves = 2
    this.stall = 0.41
    this.answers = 2
    this.seed = 7
    this.latencies = {
      queue: histogram(),
      first_token: histogram(),
      between_tokens: histogram(),
      whole: histogram(),
    }
    const told = [
      ['worker_joined', 'info', 'studio-mac joined (Apple M2 Max, 22 GiB)', 'studio-mac', 4810],
      ['worker_joined', 'info', 'gaming-pc joined (NVIDIA RTX 3060, 11.2 GiB)', 'gaming-pc', 4795],
      ['worker_joined', 'info', 'old-laptop joined (Intel i7-8650U, 9 GiB)', 'old-laptop', 4720],
      ['plan_ready', 'info', 'plan 1 serves 40 layers on 3 machines', '', 4600],
      ['slow_link', 'warning', 'gaming-pc reaches old-laptop with 21 MB/s only: it may be on Wi-Fi', 'old-laptop', 4400],
      ['move_committed', 'info', 'layers 33–34 moved from old-laptop to gaming-pc: 9 % faster; answers stood still for 0.41 s', 'gaming-pc', 3120],
      ['worker_joined', 'info', 'attic-server joined (AMD EPYC 7302, 40 GiB)', 'attic-server', 240],
    ]
    for (const [kind, level, text, worker, age] of told) this.tell(kind, level, text, worker, age)
    for (let i = 0; i < 400; i++) this.work(0.25)
  }

  random() {
    this.seed = (this.seed * 1103515245 + 12345) % 2147483648
    return this.seed / 2147483648
  }

  later(seconds, act) {
    const timer = setTimeout(() => {
      this.timers.delete(timer)
      act()
      this.changed()
    }, seconds * 1000)
    this.timers.add(timer)
  }

  changed() {
    for (const listener of this.listeners) listener('status', this.status())
  }

  tell(kind, level, text, worker = '', age_s = 0) {
    this.number += 1
    const event = { number: this.number, kind, level, text, times: 1, worker, epoch: this.epoch }
    this.events.push({ ...event, at: Date.now() - age_s * 1000 })
    this.events = this.events.slice(-256)
    for (const listener of this.listeners) listener('event', { ...event, age_s })
  }

  /** Layers of the machine that fails go to others, as the coordinator would say it. */
  death() {
    this.here.delete('gaming-pc')
    this.state = 'loading'
    this.tell('worker_lost', 'error', 'gaming-pc: no message for 3.1 s, taken for dead; 2 answers go on elsewhere', 'gaming-pc')
    this.planless = true
    this.changed()
    this.later(2.5, () => {
      this.planless = false
      this.epoch += 1
      this.plan = structuredClone(WITHOUT_PC)
      this.loading = new Set(['studio-mac', 'attic-server'])
      this.fetched = 0.1
    })
    for (let i = 1; i <= 8; i++) this.later(2.5 + i * 0.5, () => (this.fetched = 0.1 + i * 0.11))
    this.later(4.7, () => this.loading.delete('studio-mac'))
    this.later(7, () => {
      this.loading.clear()
      this.state = 'serving'
      this.tell('plan_ready', 'info', 'plan 4: layers 22–24 went to studio-mac, 25–40 to attic-server; 2 answers were computed again', 'attic-server')
    })
  }

  /** A machine comes (back), and layers move while the model is served. */
  moving() {
    this.here.add('gaming-pc')
    this.tell('worker_joined', 'info', 'gaming-pc joined (NVIDIA RTX 3060, 11.2 GiB)', 'gaming-pc')
    this.changed()
    const why = 'with gaming-pc 19 instead of 12 tokens/s are expected; the standstill of 0.4 s pays within 2 s.'
    this.later(2.5, () => {
      this.move = { phase: 'loading', why, before: this.plan, after: BETTER, begun: Date.now() }
      this.tell('move_begun', 'info', `a move to plan ${this.epoch + 1} began: ${why}`, 'gaming-pc')
    })
    this.later(6, () => (this.move = { ...this.move, phase: 'copying' }))
    this.later(7.5, () => (this.move = { ...this.move, phase: 'handover' }))
    this.later(8, () => {
      this.move = null
      this.plan = structuredClone(BETTER)
      this.epoch += 1
      this.moves += 1
      this.stall = 0.38
      this.tell('move_committed', 'info', 'layers 21–34 moved from studio-mac and attic-server to gaming-pc: 58 % faster; answers stood still for 0.38 s', 'gaming-pc')
    })
  }

  drain(name) {
    this.leaving.add(name)
    this.tell('worker_leaving', 'info', `${name} is to leave: its layers move first`, name)
    this.changed()
    this.later(3, () => {
      this.here.delete(name)
      this.leaving.delete(name)
      this.tell('worker_left', 'info', `${name} has left`, name)
    })
  }

  stepOf({ worker, layers }) {
    return MACHINES[worker].step * (layers.stop - layers.start)
  }

  roundTrip() {
    return this.plan.reduce((sum, one) => sum + this.stepOf(one), 0) + this.outside()
  }

  outside() {
    const hops = this.plan.slice(1).map((one, i) => LINKS[`${this.plan[i].worker}>${one.worker}`]?.[0] ?? 0.001)
    return hops.reduce((a, b) => a + b, 0) + 0.0018
  }

  work(seconds) {
    if (this.state !== 'serving' || this.move?.phase === 'handover') return
    const step = this.roundTrip()
    const made = Math.round((this.answers * seconds * 0.96) / step)
    this.tokens += made
    for (let i = 0; i < made; i++) {
      record(this.latencies.between_tokens, step * (0.9 + this.random() * (this.random() > 0.97 ? 1.8 : 0.25)))
    }
    if (this.random() < 0.12) {
      this.finished += 1
      record(this.latencies.first_token, 0.22 + this.random() * 0.5)
      record(this.latencies.queue, this.random() * 0.02)
    }
  }

  worker(name) {
    const machine = MACHINES[name]
    const mine = this.plan.find((one) => one.worker === name)
    const next = this.move?.after.find((one) => one.worker === name)
    const layers = this.planless ? null : (mine?.layers ?? null)
    const coming = this.move && next && (!layers || next.layers.start !== layers.start || next.layers.stop !== layers.stop)
    const count = layers ? layers.stop - layers.start : 0
    const weights = Math.round(count * LAYER_BYTES * 0.42)
    const state = this.leaving.has(name) ? 'leaving' : this.loading.has(name) || (coming && !mine) ? 'loading' : mine ? 'serving' : 'idle'
    const fetching = this.loading.has(name) && this.fetched < 1
    const advice = {
      'studio-mac': 'needed: without it the model does not fit (5.1 GiB are missing)',
      'gaming-pc': 'serves 13 of 40 layers; 19.2 tokens/s with it, 12.1 without',
      'old-laptop': mine ? 'serves 6 of 40 layers; 16.8 tokens/s with it, 15.9 without (others go on without it)' : 'left out: 18.4 tokens/s with it, 19.2 without: its link is slow',
      'attic-server': mine ? 'serves its share of 40 layers; 19.2 tokens/s with it, 14.0 without' : 'left out: 16.1 tokens/s with it, 16.8 without: it computes slower than the others',
    }[name]
    return {
      name,
      state,
      note: '',
      layers,
      next_layers: coming ? next.layers : null,
      epoch: this.epoch,
      link: mine ? 'direct' : '',
      capabilities: {
        device: machine.device,
        device_name: machine.device_name,
        platform: 'Linux',
        memory_bytes: Math.round(machine.memory),
        cores: 8,
        threads: 8,
        memory_bandwidth_bytes_per_s: 4e10,
        flops_per_s: 2e12,
      },
      memory_used_bytes: Math.round(weights + (mine ? 0.8 * GIB : 0)),
      kv_bytes: mine ? Math.round(0.5 * GIB) : 0,
      kv_used_bytes: mine ? Math.round(0.31 * GIB) : 0,
      kv_room_bytes: mine ? Math.round(Math.max(0, Math.min(2.4 * GIB, machine.memory - weights))) : 0,
      weight_bytes: weights,
      tasks_done: mine ? 48000 : 0,
      compute_s: mine ? 511 : 0,
      seconds_per_token: mine ? this.stepOf(mine) : null,
      prediction_error: mine ? 0.06 : null,
      gain: { 'studio-mac': null, 'gaming-pc': 0.58, 'old-laptop': mine ? 0.05 : -0.04, 'attic-server': mine ? 0.37 : -0.04 }[name],
      advice,
      last_heard_s: 0.3,
      fetch: fetching
        ? { here_bytes: Math.round(weights * this.fetched), total_bytes: weights, bytes_per_s: 9e7, doing: 'from studio-mac' }
        : null,
    }
  }

  pipeline() {
    const ready = this.loading.size === 0
    const stages = this.plan.map((one, i) => ({
      worker: one.worker,
      layers: one.layers,
      ready: !this.loading.has(one.worker),
      step_s: ready ? this.stepOf(one) * (0.98 + this.random() * 0.04) : null,
      predicted_s: ready ? this.stepOf(one) * [0.94, 1.07, 0.9][i % 3] : null,
      queued_s: ready ? 0.0011 : null,
      compute_s: 100,
    }))
    const links = this.plan.slice(1).map((one, i) => {
      const pair = LINKS[`${this.plan[i].worker}>${one.worker}`] ?? [0.001, 1e8]
      return {
        sender: this.plan[i].worker,
        receiver: one.worker,
        how: one.worker === 'old-laptop' ? 'relayed' : 'direct',
        latency_s: pair[0],
        bytes_per_s: pair[1],
        bytes_sent: 5e8,
      }
    })
    const times = stages.map((stage) => stage.step_s ?? 0)
    const full = 2 / Math.max(...times)
    return {
      epoch: this.epoch,
      lineage: this.epoch < 4 ? 1 : 4,
      state: ready ? (this.move?.phase === 'handover' ? 'paused' : 'serving') : 'loading',
      stages,
      links,
      move: this.move && {
        ...this.move,
        epoch: this.epoch + 1,
        copies: true,
        standstill_s: 0.4,
        copy_s: 1.1,
        bytes_sent: 3e8,
        age_s: (Date.now() - this.move.begun) / 1000,
        phase_age_s: 1,
      },
      kv_tokens: 32768,
      kv_tokens_used: 9664,
      kv_tokens_cached: 5120,
      answers_running: this.answers,
      answers_decoding: this.answers,
      steps_in_flight: ready ? 2 : 0,
      depth: 2,
      round_trip_s: ready ? this.roundTrip() : null,
      outside_s: ready ? this.outside() : null,
      step_tokens: 1,
      slowest: ready ? times.indexOf(Math.max(...times)) : null,
      bubble_ratio: 0.46,
      forecast: { tokens_per_s: 1.9 / this.roundTrip(), full_tokens_per_s: full, alone_tokens_per_s: 1 / this.roundTrip() },
    }
  }

  status() {
    const now = Date.now()
    return {
      model: MODEL,
      state: this.state,
      note: this.state === 'loading' && !this.planless ? 'attic-server loads layers 25–40' : '',
      epoch: this.epoch,
      num_layers: LAYERS,
      context_length: 32768,
      kv_tokens: 32768,
      kv_tokens_used: 9664,
      kv_tokens_cached: 5120,
      prefix_hit_tokens: 10200,
      preemptions: 0,
      moves: this.moves,
      move_stall_s: this.stall,
      answers_running: this.answers,
      answers_waiting: 0,
      requests_finished: this.finished,
      requests_cancelled: this.cancelled,
      requests_failed: 1,
      tokens_generated: this.tokens,
      rejected: {},
      workers: [...this.here].map((name) => this.worker(name)),
      events: this.events.map(({ at, ...event }) => ({ ...event, age_s: (now - at) / 1000 })),
      pipelines: this.planless ? [] : [this.pipeline()],
      counters: { uptime_s: 4900 },
      latencies: this.latencies,
      insecure: false,
      quarantined: [],
    }
  }
}
