import { readdirSync, readFileSync } from 'node:fs'

const read = (path) => readFileSync(new URL(path, import.meta.url), 'utf8')

/** Vite plugin that puts the licences of what the page is made of beside it. */
export function licences() {
  return {
    name: 'licences',
    generateBundle() {
      const used = [...Object.keys(JSON.parse(read('package.json')).dependencies), 'scheduler']
      const texts = used.sort().map((name) => {
        const folder = `node_modules/${name}/`
        const { version, license } = JSON.parse(read(`${folder}package.json`))
        const file = readdirSync(new URL(folder, import.meta.url)).find((one) => /^licen[cs]e/i.test(one))
        const text = file ? read(folder + file).trim() : `Licence: ${license}`
        return `${name} ${version}\n${'-'.repeat(72)}\n${text}\n`
      })
      this.emitFile({ type: 'asset', fileName: 'licences.txt', source: texts.join('\n\n') })
    },
  }
}
