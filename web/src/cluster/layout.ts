/** Where everything of the picture stands, in pixels. Pure.
 *
 * Wide: the coordinator, and the machines from left to right; narrow, or with many machines: from
 * top to bottom. A layer is as wide in one machine as in another.
 */

import type { Ghost, Live } from '../api/live'
import { shownPipelines } from '../api/live'
import type { LinkStatus, PipelineStatus, StageStatus, WorkerStatus } from '../api/types'

export interface Box {
  key: string
  name: string
  kind: 'stage' | 'idle' | 'gone'
  x: number
  y: number
  width: number
  height: number
  colour: number
  worker: WorkerStatus | null
  stage: StageStatus | null
  slowest: boolean
}

export interface Bar {
  key: string
  layer: number
  x: number
  y: number
  width: number
  height: number
  colour: number
  ready: boolean
  /** Colour of the machine that it moves to. */
  next: number | null
}

export interface Wire {
  key: string
  path: string
  link: LinkStatus | null
  label: { x: number; y: number; vertical: boolean }
}

export interface Row {
  key: string
  title: string
  pipeline: PipelineStatus
  coordinator: { x: number; y: number; width: number; height: number }
  wires: Wire[]
  back: string
  backLabel: { x: number; y: number }
  /** Along which tokens are seen to go. */
  way: string
}

export interface Picture {
  width: number
  height: number
  tall: boolean
  boxes: Box[]
  bars: Bar[]
  rows: Row[]
}

export const PAD = 14
const HEAD_WIDTH = 108
const HEAD_GAP = 44
/** Width of a machine at least, and of the gap between two. */
const ROOMY = { box: 164, gap: 78 }
const DENSE = { box: 140, gap: 70 }
/** Between two lines of machines, and beside them where the way turns. */
const LINE_GAP = 48
const TURN = 16
/** A window that is narrower has its machines from top to bottom. */
const NARROW = 620
const BOX_HEIGHT = 178
const BAR_TOP = 56
const BAR_HEIGHT = 56
const TALL_BOX_HEIGHT = 142
const TALL_BAR_TOP = 50
const TALL_BAR_HEIGHT = 40
const TALL_GAP = 46
const TALL_INDENT = 22
const IDLE_HEIGHT = 84
const MAX_PITCH = 30

interface Stand {
  name: string
  stage: StageStatus | null
  worker: WorkerStatus | null
  gone: boolean
}

export function layOut(live: Live, width: number): Picture {
  const picture: Picture = { width, height: 0, tall: false, boxes: [], bars: [], rows: [] }
  const status = live.status
  if (!status || width <= 0) return picture
  const pipelines = shownPipelines(live)
  const workers = new Map(status.workers.map((worker) => [worker.name, worker]))
  const lineages = new Set(pipelines.map((pipeline) => pipeline.lineage))
  const rows = pipelines.map((pipeline, i) => {
    // A machine's loss may begin a new lineage: then it is shown beside what came after it.
    const ghosts = live.ghosts.filter(
      (one) => one.lineage === pipeline.lineage || (i === 0 && !lineages.has(one.lineage)),
    )
    const title = pipelines.length > 1 ? `pipeline ${i + 1}` : 'coordinator'
    return { pipeline, index: i, title, stands: standsOf(pipeline, workers, ghosts) }
  })
  const most = Math.max(0, ...rows.map(({ stands }) => stands.length))
  picture.tall = width < NARROW
  const spacing = most > 1 && widthNeeded(most, ROOMY) > width && widthNeeded(most, DENSE) <= width ? DENSE : ROOMY
  const serving = new Set(pipelines.flatMap((one) => one.stages.map((stage) => stage.worker)))
  let y = 4
  for (const { stands, ...row } of rows) {
    y = picture.tall
      ? tallRow(picture, live, row, stands, y)
      : wideRow(picture, live, row, stands, y, spacing)
  }
  const shown = new Set(picture.boxes.map((box) => box.name))
  const lost = live.ghosts.filter((ghost) => !shown.has(ghost.worker.name))
  const idle: Stand[] = [
    ...status.workers
      .filter((worker) => !serving.has(worker.name))
      .map((worker) => ({ name: worker.name, stage: null, worker, gone: false })),
    ...lost.map(({ worker }) => ({ name: worker.name, stage: null, worker, gone: true })),
  ]
  picture.height = idle.length > 0 ? idleRow(picture, live, idle, y) : y
  return picture
}

function widthNeeded(stands: number, { box, gap }: typeof ROOMY): number {
  return HEAD_WIDTH + HEAD_GAP + stands * box + (stands - 1) * gap
}

/** The stages, with the machines that are gone where they stood. */
function standsOf(
  pipeline: PipelineStatus,
  workers: Map<string, WorkerStatus>,
  ghosts: Ghost[],
): Stand[] {
  const stands: Stand[] = pipeline.stages.map((stage) => ({
    name: stage.worker,
    stage,
    worker: workers.get(stage.worker) ?? null,
    gone: !workers.has(stage.worker),
  }))
  for (const ghost of [...ghosts].sort((a, b) => a.index - b.index)) {
    if (stands.some((stand) => stand.name === ghost.worker.name)) continue
    const stand = { name: ghost.worker.name, stage: null, worker: ghost.worker, gone: true }
    stands.splice(Math.min(ghost.index, stands.length), 0, stand)
  }
  return stands
}

function colourOf(live: Live, name: string): number {
  return live.colours[name] ?? 0
}

function boxOf(live: Live, pipeline: PipelineStatus | null, stand: Stand) {
  const at = pipeline?.stages.findIndex((stage) => stage === stand.stage) ?? -1
  const kind: Box['kind'] = stand.gone ? 'gone' : stand.stage ? 'stage' : 'idle'
  return {
    key: stand.name,
    name: stand.name,
    kind,
    colour: colourOf(live, stand.name),
    worker: stand.worker,
    stage: stand.stage,
    slowest: at >= 0 && pipeline!.stages.length > 1 && pipeline!.slowest === at,
  }
}

function nextOwners(pipeline: PipelineStatus): Map<number, string> {
  const owners = new Map<number, string>()
  for (const held of pipeline.move?.after ?? []) {
    for (let layer = held.layers.start; layer < held.layers.stop; layer++) owners.set(layer, held.worker)
  }
  return owners
}

function addBars(
  picture: Picture,
  live: Live,
  { pipeline, index }: Numbered,
  stage: StageStatus,
  at: { x: number; y: number; height: number; pitch: number },
) {
  const owners = nextOwners(pipeline)
  const gap = at.pitch > 6 ? 3 : at.pitch > 3 ? 1 : 0
  for (let layer = stage.layers.start; layer < stage.layers.stop; layer++) {
    const owner = owners.get(layer)
    picture.bars.push({
      key: `${index}:${layer}`,
      layer,
      x: at.x + (layer - stage.layers.start) * at.pitch,
      y: at.y,
      width: Math.max(1, at.pitch - gap),
      height: at.height,
      colour: colourOf(live, stage.worker),
      ready: stage.ready,
      next: owner !== undefined && owner !== stage.worker ? colourOf(live, owner) : null,
    })
  }
}

const size = (stage: StageStatus | null) => (stage ? stage.layers.stop - stage.layers.start : 0)

/** A pipeline, and which of those that are shown it is: layers slide also to a new one. */
interface Numbered {
  pipeline: PipelineStatus
  index: number
  title: string
}

/** Lines of about as many machines each, as many as fit. */
function linesOf(stands: Stand[], width: number, spacing: typeof ROOMY): Stand[][] {
  if (widthNeeded(stands.length, spacing) <= width) return [stands]
  const room = width - TURN - HEAD_WIDTH - HEAD_GAP + spacing.gap
  const most = Math.max(1, Math.floor(room / (spacing.box + spacing.gap)))
  const each = Math.ceil(stands.length / Math.ceil(stands.length / most))
  const count = Math.ceil(stands.length / each)
  return Array.from({ length: count }, (_, i) => stands.slice(i * each, (i + 1) * each))
}

function wideRow(
  picture: Picture,
  live: Live,
  row: Numbered,
  stands: Stand[],
  top: number,
  spacing: typeof ROOMY,
) {
  const { pipeline } = row
  const left = HEAD_WIDTH + HEAD_GAP
  const lines = linesOf(stands, picture.width, spacing)
  const width = lines.length > 1 ? picture.width - TURN : picture.width
  const widths = lines.map((line) => {
    const total = Math.max(1, line.reduce((sum, stand) => sum + size(stand.stage), 0))
    const spare = width - widthNeeded(line.length, spacing)
    return line.map((stand) => spacing.box + (spare * size(stand.stage)) / total)
  })
  const pitch = Math.min(
    MAX_PITCH,
    ...lines.flatMap((line, l) =>
      line.map((stand, i) => (widths[l]![i]! - 2 * PAD) / Math.max(1, size(stand.stage))),
    ),
  )
  const begin = top + BAR_TOP + BAR_HEIGHT / 2
  const coordinator = { x: 0, y: begin - 44, width: HEAD_WIDTH, height: 88 }
  const wires: Wire[] = [
    {
      key: 'in',
      path: `M${HEAD_WIDTH} ${begin}H${left}`,
      link: null,
      label: { x: HEAD_WIDTH + HEAD_GAP / 2, y: begin, vertical: false },
    },
  ]
  let way = `M${HEAD_WIDTH - 20} ${begin}`
  let from = { x: HEAD_WIDTH, name: '' }
  let y = top
  lines.forEach((line, l) => {
    const middle = y + BAR_TOP + BAR_HEIGHT / 2
    let x = left
    line.forEach((stand, i) => {
      const boxWidth = widths[l]![i]!
      const box = boxOf(live, pipeline, stand)
      picture.boxes.push({ ...box, x, y, width: boxWidth, height: BOX_HEIGHT })
      if (stand.stage) {
        const at = { x: x + PAD, y: y + BAR_TOP, height: BAR_HEIGHT, pitch }
        addBars(picture, live, row, stand.stage, at)
        const turns = l > 0 && from.x > x
        const turn = y - LINE_GAP / 2
        const before = turns ? middle - BOX_HEIGHT - LINE_GAP : middle
        const path = turns ? turning({ x: from.x, y: before }, turn, { x: left, y: middle }) : `H${x}`
        if (from.name) {
          wires.push({
            key: `${from.name}>${stand.name}`,
            path: `M${from.x} ${before}${path}`,
            link: linkOf(pipeline, from.name, stand.name),
            label: turns
              ? { x: left + PAD, y: turn - 10, vertical: true }
              : { x: x - spacing.gap / 2, y: middle, vertical: false },
          })
        }
        way += path
        from = { x: x + boxWidth, name: stand.name }
      }
      x += boxWidth + spacing.gap
    })
    y += BOX_HEIGHT + LINE_GAP
  })
  const bottom = y - LINE_GAP
  const end = Math.max(left, from.x - 36)
  const low = bottom + 24
  const head = HEAD_WIDTH / 2
  const home = `V${low - 12}Q${end} ${low} ${end - 12} ${low}H${head + 12}Q${head} ${low} ${head} ${low - 12}V`
  const foot = coordinator.y + coordinator.height
  picture.rows.push({
    key: String(row.index),
    title: row.title,
    pipeline,
    coordinator,
    wires,
    back: `M${end} ${bottom}${home}${foot}`,
    backLabel: { x: (head + end) / 2, y: low },
    way: `${way}H${end}${home}${foot - 8}`,
  })
  return low + 22
}

interface Point {
  x: number
  y: number
}

/** The way from the end of a line of machines, between both lines, to the beginning of the next. */
function turning(from: Point, y: number, to: Point): string {
  const [out, back] = [from.x + TURN - 2, to.x - HEAD_GAP / 2]
  return [
    `H${out - 8}Q${out} ${from.y} ${out} ${from.y + 8}`,
    `V${y - 8}Q${out} ${y} ${out - 8} ${y}`,
    `H${back + 8}Q${back} ${y} ${back} ${y + 8}`,
    `V${to.y - 8}Q${back} ${to.y} ${back + 8} ${to.y}H${to.x}`,
  ].join('')
}

function tallRow(picture: Picture, live: Live, row: Numbered, stands: Stand[], top: number) {
  const { pipeline } = row
  const x = TALL_INDENT
  const width = picture.width - TALL_INDENT
  const total = Math.max(1, ...stands.map((stand) => size(stand.stage)))
  const pitch = Math.min(MAX_PITCH, (width - 2 * PAD) / total)
  const coordinator = { x: 0, y: top, width: picture.width, height: 52 }
  const line = x + 40
  const wires: Wire[] = []
  let y = top + coordinator.height
  let from: { y: number; name: string } | null = null
  for (const stand of stands) {
    const above = y
    y += TALL_GAP
    picture.boxes.push({ ...boxOf(live, pipeline, stand), x, y, width, height: TALL_BOX_HEIGHT })
    if (stand.stage) {
      addBars(picture, live, row, stand.stage, {
        x: x + PAD,
        y: y + TALL_BAR_TOP,
        height: TALL_BAR_HEIGHT,
        pitch,
      })
      const start: { y: number; name: string } | null = from
      wires.push({
        key: start ? `${start.name}>${stand.name}` : 'in',
        path: `M${line} ${start ? start.y : above}V${y}`,
        link: start ? linkOf(pipeline, start.name, stand.name) : null,
        label: { x: line + 12, y: y - TALL_GAP / 2, vertical: true },
      })
      from = { y: y + TALL_BOX_HEIGHT, name: stand.name }
    }
    y += TALL_BOX_HEIGHT
  }
  const end = (from as { y: number } | null)?.y ?? y
  const low = end - 24
  const left = 8
  const up = top + coordinator.height
  picture.rows.push({
    key: String(row.index),
    title: row.title,
    pipeline,
    coordinator,
    wires,
    back: `M${x} ${low}H${left + 8}Q${left} ${low} ${left} ${low - 8}V${up}`,
    backLabel: { x: left, y: (up + low) / 2 },
    way: `M${line} ${up - 10}V${low}H${left + 8}Q${left} ${low} ${left} ${low - 8}V${up - 8}`,
  })
  return y + 22
}

function idleRow(picture: Picture, live: Live, stands: Stand[], y: number): number {
  const room = picture.width
  const perRow = Math.max(1, Math.floor((room + 16) / 240))
  const width = Math.min(320, (room - (perRow - 1) * 16) / perRow)
  const top = y + (picture.rows.length > 0 ? 26 : 0)
  stands.forEach((stand, i) => {
    picture.boxes.push({
      ...boxOf(live, null, stand),
      x: (i % perRow) * (width + 16),
      y: top + Math.floor(i / perRow) * (IDLE_HEIGHT + 16),
      width,
      height: IDLE_HEIGHT,
    })
  })
  return top + Math.ceil(stands.length / perRow) * (IDLE_HEIGHT + 16)
}

function linkOf(pipeline: PipelineStatus, sender: string, receiver: string): LinkStatus | null {
  return (
    pipeline.links.find((link) => link.sender === sender && link.receiver === receiver) ?? null
  )
}
