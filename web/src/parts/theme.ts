/** Light or dark: as the system has it, unless somebody chose. */

export type Theme = 'system' | 'light' | 'dark'

const SLOT = 'dllm.theme'

export function chosenTheme(): Theme {
  const kept = localStorage.getItem(SLOT)
  return kept === 'light' || kept === 'dark' ? kept : 'system'
}

export function applyTheme(theme: Theme = chosenTheme()): void {
  if (theme === 'system') delete document.documentElement.dataset.theme
  else document.documentElement.dataset.theme = theme
}

export function chooseTheme(theme: Theme): void {
  if (theme === 'system') localStorage.removeItem(SLOT)
  else localStorage.setItem(SLOT, theme)
  applyTheme(theme)
}
