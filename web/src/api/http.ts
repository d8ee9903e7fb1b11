import { theKey } from './key'

/** A request that was refused, or that reached nobody (`status` 0). */
export class ApiError extends Error {
  constructor(
    readonly status: number,
    message: string,
    readonly code: string | null = null,
  ) {
    super(message)
  }
}

export async function ask(
  path: string,
  options: { method?: string; body?: unknown; signal?: AbortSignal; accept?: string } = {},
): Promise<Response> {
  const headers: Record<string, string> = {}
  const key = theKey()
  if (key !== null) headers['Authorization'] = `Bearer ${key}`
  if (options.accept) headers['Accept'] = options.accept
  if (options.body !== undefined) headers['Content-Type'] = 'application/json'
  let response: Response
  try {
    response = await fetch(path, {
      method: options.method ?? (options.body === undefined ? 'GET' : 'POST'),
      headers,
      body: options.body === undefined ? undefined : JSON.stringify(options.body),
      signal: options.signal,
      cache: 'no-store',
      credentials: 'omit',
    })
  } catch (error) {
    if (options.signal?.aborted) throw error
    throw new ApiError(0, 'The API does not answer. It may be stopped, or the network may be away.')
  }
  if (!response.ok) throw await refusal(response)
  return response
}

export async function askJson<T>(path: string, options: Parameters<typeof ask>[1] = {}): Promise<T> {
  const response = await ask(path, options)
  const text = await response.text()
  return (text === '' ? {} : JSON.parse(text)) as T
}

async function refusal(response: Response): Promise<ApiError> {
  const fallback = `The API answered with status ${response.status}.`
  try {
    return errorOf(response.status, await response.json(), fallback)
  } catch {
    return new ApiError(response.status, fallback)
  }
}

/** Reads an error body in OpenAI's shape; also the one inside a stream. */
export function errorOf(status: number, body: unknown, fallback: string): ApiError {
  const told = (body as { error?: unknown } | null)?.error
  if (typeof told === 'string') return new ApiError(status, told)
  const error = told as { message?: unknown; code?: unknown } | undefined
  const message = typeof error?.message === 'string' ? error.message : fallback
  return new ApiError(status, message, typeof error?.code === 'string' ? error.code : null)
}

export function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error)
}
