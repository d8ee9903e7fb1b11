/** The key of whoever looks at the page: kept for this tab only, and out of the address bar. */

const SLOT = 'dllm.key'

export function keyInFragment(hash: string): string | null {
  const key = new URLSearchParams(hash.replace(/^#/, '')).get('key')
  return key?.trim() || null
}

/** Moves a key from the address to the tab's storage, so that nobody sees or bookmarks it. */
export function takeKey(): void {
  const key = keyInFragment(location.hash)
  if (key === null) return
  keepKey(key)
  history.replaceState(null, '', location.pathname + location.search)
}

export function theKey(): string | null {
  return sessionStorage.getItem(SLOT)
}

export function keepKey(key: string): void {
  sessionStorage.setItem(SLOT, key)
}

export function forgetKey(): void {
  sessionStorage.removeItem(SLOT)
}
