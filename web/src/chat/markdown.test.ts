// @vitest-environment jsdom
import { describe, expect, it } from 'vitest'
import { inertHtml } from './markdown'

const HOSTILE = [
  '<img src=x onerror="alert(1)">',
  '<script>alert(1)</script>',
  '</script><script>alert(1)</script>',
  '[click](javascript:alert(1))',
  '[click](JaVaScRiPt:alert(1))',
  '[click](java\tscript:alert(1))',
  '[click](&#106;avascript:alert(1))',
  '[click](data:text/html,<script>alert(1)</script>)',
  '[click](vbscript:x)',
  '[click](//evil.example/)',
  '![remote](https://evil.example/pixel.png)',
  '![x](x "onerror=alert(1)")',
  '![a"onerror="alert(1)](https://evil.example/x)',
  '<svg onload=alert(1)><a xlink:href="javascript:alert(1)">x</a></svg>',
  '<math><mtext><table><mglyph><style><img src=x onerror="alert(1)">',
  '<iframe srcdoc="<script>alert(1)</script>"></iframe>',
  '<style>body{display:none}</style><link rel=stylesheet href=//evil.example>',
  '<div style="background:url(https://evil.example)">x</div>',
  '<form action="https://evil.example"><input name=x><button>go</button></form>',
  '<base href="https://evil.example/"><meta http-equiv=refresh content="0;url=https://evil.example">',
  '<video src=//evil.example autoplay></video><object data=x></object><embed src=x>',
  '```html"><img/src=x/onerror=alert(1)>\n<img src=x onerror=alert(1)>\n```',
  '```python\n<img src=x onerror=alert(1)>\n```',
  '`<img src=x onerror=alert(1)>`',
  '<a href="https://ok.example" onclick="alert(1)" style="x" id="root" name="y" target="_self">x</a>',
  '- [x] <input autofocus onfocus=alert(1)>',
  '| a |\n|---|\n| <img src=x onerror=alert(1)> |',
]

const ALLOWED = /^(a|b|blockquote|br|code|del|em|h[1-6]|hr|i|li|ol|p|pre|s|span|strong|sub|sup|table|tbody|td|th|thead|tr|ul)$/
const ATTRIBUTES = /^(href|class|start|align|target|rel)$/

describe('what a model writes', () => {
  it.each(HOSTILE)('%s can do nothing', (text) => {
    const page = document.createElement('div')
    page.innerHTML = inertHtml(`before\n\n${text}\n\nafter`)
    for (const element of page.querySelectorAll('*')) {
      expect(element.tagName.toLowerCase()).toMatch(ALLOWED)
      for (const { name } of element.attributes) expect(name).toMatch(ATTRIBUTES)
      const target = element.getAttribute('href')
      if (target !== null) expect(target).toMatch(/^(https?:\/\/|mailto:)/)
    }
    expect(page.textContent).toContain('before')
    expect(page.textContent).toContain('after')
  })

  it('keeps its form', () => {
    const html = inertHtml('# A\n\n**b** `c` [d](https://example.org)\n\n```python\nimport os\n```\n\n1. e')
    expect(html).toContain('<h1>A</h1>')
    expect(html).toContain('<strong>b</strong>')
    expect(html).toContain('href="https://example.org"')
    expect(html).toContain('rel="noopener noreferrer nofollow"')
    expect(html).toContain('<span class="hljs-keyword">import</span>')
  })

  it('shows HTML as text', () => {
    const page = document.createElement('div')
    page.innerHTML = inertHtml('see <b>this</b> & <img src=x>')
    expect(page.textContent).toContain('<b>this</b> & <img src=x>')
  })
})
