/** Builds the page anew, and compares with the files that are committed: `npm run check-build`. */

import { execFileSync } from 'node:child_process'
import { mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'

const committed = fileURLToPath(new URL('../distributed_llm/api/page/static', import.meta.url))
const fresh = mkdtempSync(join(tmpdir(), 'page-'))

function filesIn(folder) {
  const entries = readdirSync(folder, { recursive: true, withFileTypes: true })
  const files = entries.filter((one) => one.isFile())
  return new Map(
    files.map((one) => {
      const path = join(one.parentPath, one.name)
      return [path.slice(folder.length), readFileSync(path)]
    }),
  )
}

try {
  execFileSync('npx', ['vite', 'build', '--outDir', fresh, '--emptyOutDir', '--logLevel', 'warn'], {
    cwd: fileURLToPath(new URL('.', import.meta.url)),
    stdio: 'inherit',
  })
  const [old, now] = [filesIn(committed), filesIn(fresh)]
  const wrong = [...new Set([...old.keys(), ...now.keys()])].filter((name) => {
    const [a, b] = [old.get(name), now.get(name)]
    return !a || !b || !a.equals(b)
  })
  if (wrong.length > 0) {
    console.error(`The committed page is not what web/ builds: ${wrong.join(', ')}.`)
    console.error('Run `npm ci && npm run build` in web/, and commit what changes.')
    process.exitCode = 1
  } else console.log(`The ${now.size} committed files are what web/ builds.`)
} finally {
  rmSync(fresh, { recursive: true })
}
