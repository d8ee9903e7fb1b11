/** Turns what a model wrote into HTML that can do nothing.
 *
 * A model may write anything, also what somebody else put into its prompt. DOMPurify comes last:
 * nothing is changed after it.
 */

import DOMPurify from 'dompurify'
import hljs from 'highlight.js/lib/core'
import bash from 'highlight.js/lib/languages/bash'
import cpp from 'highlight.js/lib/languages/cpp'
import css from 'highlight.js/lib/languages/css'
import javascript from 'highlight.js/lib/languages/javascript'
import json from 'highlight.js/lib/languages/json'
import python from 'highlight.js/lib/languages/python'
import rust from 'highlight.js/lib/languages/rust'
import sql from 'highlight.js/lib/languages/sql'
import typescript from 'highlight.js/lib/languages/typescript'
import xml from 'highlight.js/lib/languages/xml'
import yaml from 'highlight.js/lib/languages/yaml'
import { Marked } from 'marked'

const LANGUAGES = { bash, cpp, css, javascript, json, python, rust, sql, typescript, xml, yaml }
for (const [name, language] of Object.entries(LANGUAGES)) hljs.registerLanguage(name, language)

const MAX_CHARS = 200_000
const MAX_CODE_CHARS = 50_000

const escaped = (text: string) =>
  text.replace(/[&<>"']/g, (letter) => `&#${letter.charCodeAt(0)};`)

const marked = new Marked({
  async: false,
  gfm: true,
  breaks: false,
  renderer: {
    code({ text, lang }) {
      const language = lang?.split(/\s/)[0]?.toLowerCase() ?? ''
      const known = hljs.getLanguage(language) && text.length < MAX_CODE_CHARS
      const html = known ? hljs.highlight(text, { language, ignoreIllegals: true }).value : escaped(text)
      return `<pre><code class="hljs">${html}</code></pre>`
    },
    // What looks like HTML is shown as it was written.
    html: ({ text }) => escaped(text),
    // An image would be fetched from wherever the model says.
    image: ({ href, text }) => `<span>${escaped(text || 'image')} (${escaped(href)})</span>`,
    // A checkbox would be an input.
    checkbox: ({ checked }) => (checked ? '☑ ' : '☐ '),
  },
})

const purifier = DOMPurify(window)

purifier.addHook('uponSanitizeAttribute', (_, attribute) => {
  if (attribute.attrName === 'class' && !/^hljs[\w -]*$/.test(attribute.attrValue)) {
    attribute.keepAttr = false
  }
})
purifier.addHook('afterSanitizeAttributes', (node) => {
  if (node.tagName !== 'A') return
  node.setAttribute('target', '_blank')
  node.setAttribute('rel', 'noopener noreferrer nofollow')
})

const TAGS =
  'a b blockquote br code del em h1 h2 h3 h4 h5 h6 hr i li ol p pre s span strong sub sup table tbody td th thead tr ul'

export function inertHtml(markdown: string): string {
  const html = marked.parse(markdown.slice(0, MAX_CHARS)) as string
  return purifier.sanitize(html, {
    ALLOWED_TAGS: TAGS.split(' '),
    ALLOWED_ATTR: ['href', 'class', 'start', 'align'],
    ALLOW_DATA_ATTR: false,
    ALLOW_ARIA_ATTR: false,
    ALLOWED_URI_REGEXP: /^(?:https?:\/\/|mailto:)/i,
  })
}
