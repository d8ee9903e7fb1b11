import { createRoot } from 'react-dom/client'
import { takeKey } from './api/key'
import { App } from './app'
import { applyTheme } from './parts/theme'
import './style/base.css'
import './style/shell.css'
import './style/cluster.css'

applyTheme()
takeKey()
createRoot(document.getElementById('root')!).render(<App />)
