/** Chromium, and what is watched on every page: what it loads, what it complains of. */

import axe from 'axe-core'
import { chromium } from 'playwright-core'

const CHROMIUM = process.env.CHROMIUM ?? '/usr/bin/chromium'
const FLAGS = ['--no-sandbox', '--headless', '--disable-gpu', '--disable-background-networking']

export const launch = () => chromium.launch({ executablePath: CHROMIUM, args: FLAGS })

export const failures = []

export function check(holds, what) {
  if (!holds) failures.push(what)
  console.log(`${holds ? '  ok  ' : 'WRONG '} ${what}`)
}

/** Opens the page, watched; `key` null for none. */
export async function open(browser, base, key, options = {}) {
  const context = await browser.newContext({
    viewport: { width: 1280, height: 900 },
    deviceScaleFactor: 1.5,
    ...options,
  })
  await context.grantPermissions(['clipboard-read', 'clipboard-write'])
  const page = await context.newPage()
  page.seen = { elsewhere: [], complaints: [], bytes: 0 }
  page.on('request', (request) => {
    if (!request.url().startsWith(base)) page.seen.elsewhere.push(request.url())
  })
  page.on('pageerror', (error) => page.seen.complaints.push(error.message))
  page.on('console', (message) => {
    const text = message.text()
    // A browser itself reports each answer that is no success.
    if (message.type() === 'error' && !/^Failed to load resource/.test(text)) {
      page.seen.complaints.push(text)
    }
  })
  await page.addInitScript(() => {
    window.violations = []
    document.addEventListener('securitypolicyviolation', (event) => {
      window.violations.push(`${event.violatedDirective}: ${event.blockedURI}`)
    })
  })
  const devtools = await context.newCDPSession(page)
  await devtools.send('Network.enable')
  devtools.on('Network.loadingFinished', ({ encodedDataLength }) => {
    page.seen.bytes += encodedDataLength
  })
  await page.goto(key === null ? base : `${base}/#key=${encodeURIComponent(key)}`)
  return page
}

/** Checks what must hold of a page whatever was done on it, and closes it. */
export async function leave(page, what) {
  const violations = await page.evaluate(() => window.violations)
  check(page.seen.elsewhere.length === 0, `${what}: nothing comes from elsewhere ${page.seen.elsewhere}`)
  check(violations.length === 0, `${what}: the policy is kept ${violations}`)
  check(page.seen.complaints.length === 0, `${what}: the console is silent ${page.seen.complaints}`)
  await page.context().close()
}

export async function accessible(page, what) {
  await page.waitForTimeout(900) // colours that are still changing would be measured
  // The policy of the page allows no script tags; an evaluated string is none.
  await page.evaluate(axe.source)
  const { violations } = await page.evaluate(() =>
    window.axe.run({ runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'best-practice'] }),
  )
  const told = violations.map((one) => `${one.id} (${one.impact}): ${one.nodes.map((node) => node.target).join(' ')}`)
  check(told.length === 0, `${what}: axe finds nothing ${told.join('; ')}`)
  const wide = await page.evaluate(() => document.documentElement.scrollWidth > innerWidth)
  check(!wide, `${what}: nothing is wider than the window`)
}
