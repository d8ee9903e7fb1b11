import { defineConfig } from 'vite'
import { licences } from './licences.mjs'

const API = 'http://127.0.0.1:8765' // npm run mock

export default defineConfig({
  plugins: [licences()],
  esbuild: { jsx: 'automatic' },
  build: {
    outDir: '../distributed_llm/api/page/static',
    emptyOutDir: true,
    assetsInlineLimit: 0, // the page's policy allows no data: URLs
    modulePreload: { polyfill: false },
    target: 'es2022',
  },
  server: { proxy: { '/api': API, '/v1': API, '/tokenize': API, '/mock': API } },
})
