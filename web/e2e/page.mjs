/** Drives the page in a browser: `node e2e/page.mjs URL [KEY] [PART …]`.
 *
 * Without parts, all that work with any server; "mock" adds those that need mock/server.mjs.
 * `gone`, `joined` and `moved` wait until the page shows a machine's death, a new one, or a move;
 * against a real cluster somebody else has to bring it about, as scripts/walk_page.py does. Screenshots go to docs/images/ with SHOTS=1.
 */

import { mkdirSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import { accessible, check, failures, launch, leave, open } from './browser.mjs'
import { HOSTILE } from './hostile.mjs'

const [base, key = 'admin-key', ...asked] = process.argv.slice(2)
if (!base) {
  console.error('usage: node e2e/page.mjs URL [KEY] [PART …]')
  process.exit(2)
}
const IMAGES = fileURLToPath(new URL('../../docs/images/', import.meta.url))
const WAIT = { timeout: 60_000 }
const withMock = asked.includes('mock')
const browser = await launch()

async function shot(page, name) {
  if (!process.env.SHOTS) return
  mkdirSync(IMAGES, { recursive: true })
  await page.screenshot({ path: `${IMAGES}page-${name}.png` })
}

const scene = (page, name) =>
  page.evaluate((scene) => fetch('/mock/scene', { method: 'POST', body: JSON.stringify({ scene }) }), name)

const go = (page, view) => page.evaluate((name) => (location.hash = name), view)
const drawn = (page) => page.waitForSelector('.picture svg .machine', WAIT)

async function look() {
  let page = await open(browser, base, key)
  await drawn(page)
  const paint = await page.evaluate(
    () => performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? 0,
  )
  console.log(`       drawn after ${Math.round(paint)} ms`) // a busy machine may take longer; so it is told only
  await page.waitForTimeout(500)
  check(page.seen.bytes < 200_000, `the first view is ${page.seen.bytes} bytes`)
  const address = page.url()
  check(!address.includes(key), 'the key has left the address bar')
  await page.waitForTimeout(6_000) // a line of tokens per second
  await accessible(page, 'cluster')
  await shot(page, 'cluster')
  await page.keyboard.press('Tab')
  await page.keyboard.press('Enter')
  check(await page.evaluate(() => document.activeElement.id === 'main'), 'the first key goes to the content')
  await leave(page, 'cluster')

  page = await open(browser, base, key, { colorScheme: 'dark' })
  await drawn(page)
  await page.waitForTimeout(6_000)
  await accessible(page, 'cluster, dark')
  await shot(page, 'cluster-dark')
  await leave(page, 'cluster, dark')

  page = await open(browser, base, key, { viewport: { width: 360, height: 780 }, deviceScaleFactor: 2 })
  await drawn(page)
  await page.waitForTimeout(3_000)
  for (const view of ['cluster', 'chat', 'learn']) {
    await go(page, view)
    await page.waitForTimeout(500)
    await accessible(page, `${view}, 360 px`)
    if (view === 'cluster') await shot(page, 'cluster-360')
  }
  await leave(page, '360 px')

  page = await open(browser, base, key, { reducedMotion: 'reduce' })
  await drawn(page)
  await page.waitForTimeout(1_500)
  check((await page.locator('animateMotion').count()) === 0, 'nothing moves for those who asked for that')
  await leave(page, 'without motion')
}

async function say(page, text) {
  await page.fill('#say', text)
  await page.keyboard.press('Enter')
}

const answered = (page) => page.waitForSelector('.composer .primary', WAIT)
const last = (page) => page.locator('.turn.assistant').last()

async function chat() {
  const page = await open(browser, base, key)
  await drawn(page)
  await go(page, 'chat')
  await accessible(page, 'empty chat')
  await say(page, 'How does one language model run on several machines?')
  await page.waitForSelector('.turn.assistant .markdown > *', WAIT)
  await answered(page)
  const first = await last(page).locator('.markdown').textContent()
  check(first.trim().length > 0, `an answer: ${JSON.stringify(first.slice(0, 60))}`)
  await last(page).locator('.stats summary').click()
  const stats = await last(page).locator('.stats').textContent()
  check(/token/.test(stats) && /layers/.test(stats), 'its statistics say who computed what')
  await accessible(page, 'chat')
  await shot(page, 'chat')

  await last(page).getByRole('button', { name: 'Regenerate' }).click()
  await page.getByText('2 of 2').first().waitFor(WAIT).catch(() => {})
  await answered(page)
  await page.getByText('2 of 2').first().waitFor(WAIT)
  await page.getByRole('button', { name: 'Previous branch' }).first().click()
  check((await last(page).locator('.markdown').textContent()) === first, 'the first answer is still there')

  await page.locator('.turn.user').first().hover()
  await page.getByRole('button', { name: 'Edit' }).first().click()
  await page.getByLabel('Edit your message').fill('Tell me a long story about a robot and a lantern.')
  await page.getByRole('button', { name: 'Ask anew' }).click()
  await page.waitForSelector('.turn.assistant .markdown > *', WAIT)
  await page.getByRole('button', { name: 'Stop' }).click({ timeout: 5_000 }).catch(() => {})
  await answered(page)
  check((await page.getByText('2 of 2').count()) > 0, 'an edited question is another branch')

  await page.waitForTimeout(1_200)
  await page.reload()
  await drawn(page).catch(() => {})
  await page.getByRole('button', { name: 'Tell me a long story about a robot and a lantern.' }).first().click()
  check((await page.locator('.turn').count()) >= 2, 'conversations outlive the page')
  await leave(page, 'chat')
}

/** Whatever server: a model that answers with what might do harm. */
async function hostile() {
  const page = await open(browser, base, key)
  const stream = (text) =>
    `data: ${JSON.stringify({ choices: [{ index: 0, delta: { content: text, reasoning_content: text } }] })}\n\ndata: [DONE]\n\n`
  await page.route('**/v1/chat/completions', (route) =>
    route.fulfill({ status: 200, contentType: 'text/event-stream', body: stream(HOSTILE.join('\n\n')) }),
  )
  await drawn(page)
  await go(page, 'chat')
  await say(page, '<img src=x onerror="window.pwned=9">')
  await answered(page)
  await page.waitForTimeout(1_000)
  check((await page.evaluate(() => window.pwned)) === undefined, 'no script of an answer runs')
  const bad = await page.evaluate(() => {
    const answer = document.querySelector('.turns')
    const elements = answer.querySelectorAll('img, script, iframe, style, form, input, svg, object, embed, video, link, meta')
    const links = [...answer.querySelectorAll('a')].map((a) => a.href).filter((one) => one && !/^(https?|mailto):/.test(one))
    return [...[...elements].map((one) => one.outerHTML), ...links]
  })
  check(bad.length === 0, `nothing of it is more than text ${bad}`)
  check((await page.locator('.turns a[href="https://example.org/fine"]').count()) > 0, 'a link that is fine is one')
  await leave(page, 'hostile answer')
}

async function learn() {
  const page = await open(browser, base, key)
  await drawn(page)
  await go(page, 'learn')
  await page.getByRole('button', { name: 'Follow it' }).click()
  await page.waitForSelector('.station.now', WAIT)
  await page.getByRole('button', { name: 'Follow it' }).waitFor(WAIT)
  const stations = await page.locator('.station').count()
  check(stations >= 3, `${stations} stations`)
  await page.waitForTimeout(2_500)
  await accessible(page, 'learn')
  await shot(page, 'learn')
  for (let i = 0; i < stations; i++) await page.getByRole('button', { name: 'Forward' }).click()
  await page.locator('.tokens button').first().click()
  await page.locator('.station .title').last().click()
  check((await page.locator('.candidates li').count()) > 0, 'the likeliest tokens are shown at the end')
  await leave(page, 'learn')
}

async function keys() {
  const page = await open(browser, base, 'wrong-key')
  await page.waitForSelector('#key', WAIT)
  check((await page.getByRole('alert').count()) > 0, 'a wrong key is told')
  await accessible(page, 'sign-in')
  await page.fill('#key', key)
  await page.keyboard.press('Enter')
  await drawn(page)
  await page.getByRole('button', { name: 'Forget key' }).click()
  await page.waitForSelector('#key', WAIT)
  check((await page.evaluate(() => sessionStorage.length)) === 0, 'a key can be forgotten')
  await leave(page, 'keys')
}

async function admin() {
  const page = await open(browser, base, key)
  await drawn(page)
  await page.getByRole('button', { name: 'Make a join line' }).click()
  await page.waitForSelector('.invitation .qr', WAIT)
  check((await page.locator('.invitation .line').textContent()).length > 20, 'a join line, and its QR code')
  await accessible(page, 'admin')
  await leave(page, 'admin')
}

async function drain() {
  const page = await open(browser, base, key)
  await drawn(page)
  const button = page.getByRole('button', { name: /^Drain / }).last()
  const name = (await button.getAttribute('aria-label')).replace('Drain ', '')
  await button.click()
  await page.getByRole('button', { name: 'Let it leave' }).click()
  await page.getByText(new RegExp(`${name}.*(left|leav)`)).first().waitFor(WAIT)
  check(true, `${name} was drained`)
  await leave(page, 'drain')
}

async function gone() {
  const page = await open(browser, base, key)
  await drawn(page)
  if (withMock) await scene(page, 'death')
  const box = page.locator('.machine.gone').first()
  await box.waitFor(WAIT)
  await page.waitForTimeout(1_000)
  const reason = await box.locator('p').textContent()
  check(reason.length > 10, `a machine is gone, and why: ${reason}`)
  await shot(page, 'death')
  await accessible(page, 'after a death')
  const others = () =>
    document.querySelector('.machine.stage.loading') && !document.querySelector('.machine.gone.loading')
  // Where that takes less than a second it may be missed.
  await page.waitForFunction(others, null, { timeout: 10_000 }).catch(() => {})
  await page.waitForTimeout(1_500)
  await shot(page, 'recovery')
  await page.waitForFunction(() => document.querySelectorAll('.bar .loading').length === 0, null, WAIT)
  check((await page.locator('.bar').count()) > 0, 'its layers are with others')
  await leave(page, 'death')
}

/** A machine called "late" joins. */
async function joined() {
  const page = await open(browser, base, key)
  await drawn(page)
  await page.locator('.picture').getByText('late', { exact: true }).first().waitFor({ ...WAIT, state: 'attached' })
  check(true, 'a machine has joined, and is in the picture')
  await leave(page, 'joining')
}

async function moved() {
  const page = await open(browser, base, key)
  await drawn(page)
  if (withMock) await scene(page, 'moving')
  await page.waitForSelector('.bar .arriving', WAIT)
  await page.waitForTimeout(1_200)
  check(/moving/.test(await page.locator('.headline').textContent()), 'a move is told with its reason')
  await shot(page, 'move')
  await page.waitForFunction(() => document.querySelectorAll('.bar .arriving').length === 0, null, WAIT)
  check(true, 'and it ends')
  await leave(page, 'move')
}

async function away() {
  const page = await open(browser, base, key)
  await drawn(page)
  await scene(page, 'away')
  await page.waitForSelector('.banner', WAIT)
  await accessible(page, 'nobody answers')
  check((await page.locator('.machine').count()) > 0, 'what was known stays')
  await scene(page, 'back')
  await page.waitForSelector('.connection.live', WAIT)
  check((await page.locator('.banner').count()) === 0, 'and the page finds back by itself')
  await leave(page, 'away')
}

async function continues() {
  const page = await open(browser, base, key)
  await drawn(page)
  await scene(page, 'completion-only')
  await go(page, 'chat')
  await say(page, 'Once upon a time')
  await page.waitForSelector('.notice', WAIT)
  await answered(page)
  check((await last(page).locator('.markdown').textContent()).includes('robot'), 'a model without chat template goes on with the text')
  await scene(page, 'chat')
  await leave(page, 'continuing')
}

const ANYWHERE = { look, chat, hostile, learn, keys, admin }
const OVER_MOCK = { ...ANYWHERE, gone, moved, drain, away, continues }
const PARTS = { ...OVER_MOCK, joined }
const named = asked.filter((name) => name !== 'mock')
const chosen = named.length > 0 ? named : Object.keys(withMock ? OVER_MOCK : ANYWHERE)

try {
  for (const name of chosen) {
    console.log(name)
    if (withMock) {
      const page = await open(browser, base, key)
      await scene(page, 'reset')
      await page.context().close()
      if (name === 'moved') {
        const other = await open(browser, base, key)
        await scene(other, 'death')
        await other.waitForTimeout(8_000)
        await other.context().close()
      }
    }
    await PARTS[name]()
  }
} finally {
  await browser.close()
}
console.log(failures.length === 0 ? 'All is well.' : `${failures.length} wrong:\n${failures.join('\n')}`)
process.exitCode = failures.length === 0 ? 0 : 1
