/** What a model might write to do harm to those who read it. */

export const HOSTILE = [
  '<img src=x onerror="window.pwned=1">',
  '</script><script>window.pwned=2</script>',
  '[click](javascript:window.pwned=3) [fine](https://example.org/fine)',
  '![remote](https://evil.example/pixel.png)',
  '<svg onload="window.pwned=4"></svg>',
  '<a href="data:text/html,<script>window.pwned=5</script>">data</a>',
  '<iframe src="https://evil.example"></iframe><object data="https://evil.example"></object>',
  '<style>body{display:none}</style><link rel=stylesheet href="https://evil.example/x.css">',
  '<form action="https://evil.example"><input name=key autofocus onfocus="window.pwned=6"></form>',
  '<div style="position:fixed;inset:0;background:url(https://evil.example/css)">over</div>',
  '<math><mtext><table><mglyph><style><img src=x onerror="window.pwned=7">',
  '```html"><img/src=x/onerror=window.pwned=8>\n<img src=x onerror="window.pwned=8">\n```',
  '<base href="https://evil.example/"><meta http-equiv=refresh content="0;url=https://evil.example">',
]
