import qrcode from 'qrcode-generator'

const QUIET = 4

export function QrCode({ text }: { text: string }) {
  const code = qrcode(0, 'L')
  code.addData(text)
  code.make()
  const count = code.getModuleCount()
  let path = ''
  for (let row = 0; row < count; row++) {
    for (let column = 0; column < count; column++) {
      if (code.isDark(row, column)) path += `M${column + QUIET} ${row + QUIET}h1v1h-1z`
    }
  }
  const size = count + 2 * QUIET
  return (
    <svg className="qr" viewBox={`0 0 ${size} ${size}`} role="img" aria-label="The join line as a QR code">
      <rect width={size} height={size} fill="#fff" />
      <path d={path} fill="#000" shapeRendering="crispEdges" />
    </svg>
  )
}
