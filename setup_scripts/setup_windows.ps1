# Set up on Windows. See --help. Windows PowerShell 5.1 or newer.
#
# Builds of PyTorch: on Windows the one that pip finds by itself is for CPUs. Those for NVIDIA
# graphics cards come from PyTorch's own package index; set DLLM_TORCH_INDEX_URL to its address,
# which PyTorch's page "Get started" shows. Only PyTorch is looked for there.

Set-StrictMode -Version 3
$ErrorActionPreference = 'Stop'

$Root = Split-Path -Parent $PSScriptRoot
$Venv = Join-Path $Root '.venv'
$VenvPython = Join-Path $Venv 'Scripts\python.exe'
$Dllm = Join-Path $Venv 'Scripts\dllm.exe'
$Stamp = Join-Path $Venv '.installed'
$Constraints = Join-Path $Root 'constraints.txt'
$Config = Join-Path $Root 'config\local.yaml'

$Role = ''
$Coordinator = ''
$JoinLine = ''
$Name = ''
$Model = ''
$Bind = ''
$Service = ''
$DryRun = $false
$Passed = @() # on to dllm or pytest

$Usage = @'
Usage: powershell -ExecutionPolicy Bypass -File setup_scripts\setup_windows.ps1 [ROLE] [OPTIONS]

Installs distributed_llm into .venv in this folder, then does what ROLE says. Run it again at any
time: what is done already is not done again.

Roles:
  (none)         only install, with the packages of developers
  demo           run a coordinator and three workers on this machine
  test           run all tests; their packages are installed too
  coordinator    run the coordinator
  worker         run a worker that joins a coordinator

Options:
  --coordinator WHERE       worker: the coordinator to join: the line dllm://... that "dllm token
                            create" prints there; HOST:PORT afterwards, or on its own machine
  --name NAME               worker: what to call it; default: after this machine
  --model MODEL             coordinator: folder or hub id of the model; default: a small built-in one
                            worker: folder of the model here, if it is not the coordinator's
  --bind HOST:PORT          coordinator: where to listen; default: only this machine
  --service                 worker, coordinator: run in the background, also after a restart
  --uninstall-service       worker, coordinator: stop that and remove it
  --dry-run                 print what would be done and change nothing
  --help                    print this

All that follows the role and is not listed here is passed on: to dllm, as in
"worker --threads 4 --max-memory 6GiB --peer-bind 0.0.0.0:5556", or to pytest. A service of a worker
waits for its coordinator (--wait).

Environment:
  PYTHON                    the Python to use; default: the first of 3.11 or newer
  DLLM_TORCH_INDEX_URL      a further package index for PyTorch, to get another build of it
'@

# What happened, why, what to do.
function Stop-Setup([int] $Code, [string[]] $Message) {
    foreach ($line in $Message) { [Console]::Error.WriteLine($line) }
    exit $Code
}

# The command line as Windows programs read it.
function Join-Arguments([string[]] $Arguments) {
    $quoted = foreach ($argument in $Arguments) {
        if ($argument -match '[\s"]') { '"' + ($argument -replace '"', '\"') + '"' } else { $argument }
    }
    return ($quoted -join ' ')
}

# Run a program, or print it if this is a dry run; return its exit code.
function Invoke-Program([string] $Program, [string[]] $Arguments) {
    if ($DryRun) {
        Write-Host "would run: $(Join-Arguments (@($Program) + $Arguments))"
        return 0
    }
    & $Program @Arguments | Out-Host
    return $LASTEXITCODE
}

# "3.12", or nothing if this is no Python. The Microsoft Store has a python.exe that only says so.
function Get-PythonVersion([string[]] $Candidate) {
    $options = @($Candidate | Select-Object -Skip 1)
    $code = 'import sys; sys.stdout.write(str(sys.version_info[0]) + chr(46) + str(sys.version_info[1]))'
    try {
        $version = & $Candidate[0] @options -c $code 2>$null
        if ($LASTEXITCODE -eq 0 -and $version -match '^3\.\d+$') { return [string] $version }
    } catch {
        return '' # no such program
    }
    return ''
}

function Test-NewEnough([string] $Version) {
    return ($Version -ne '' -and [int] $Version.Split('.')[1] -ge 11)
}

function Find-Python {
    if ($env:PYTHON) {
        if (Test-NewEnough (Get-PythonVersion @($env:PYTHON))) { return @($env:PYTHON) }
        Stop-Setup 1 @("PYTHON is set to $env:PYTHON, which is not Python 3.11 or newer.")
    }
    $seen = @()
    foreach ($candidate in @('py -3', 'py -3.14', 'py -3.13', 'py -3.12', 'py -3.11', 'python', 'python3')) {
        $version = Get-PythonVersion $candidate.Split(' ')
        if (Test-NewEnough $version) { return $candidate.Split(' ') }
        if ($version -ne '') { $seen += "$candidate is $version" }
    }
    $found = ''
    if ($seen) { $found = ' (' + ($seen -join ', ') + ')' }
    Stop-Setup 1 @(
        "Python 3.11 or newer is needed, and none was found$found.",
        'Install it: winget install Python.Python.3.12, then open a new window and run this again.',
        'If it is there under another name, say which: $env:PYTHON = "C:\path\to\python.exe"'
    )
}

# The venv runs, and is still where it was made (its programs contain its path).
function Test-Venv {
    if (-not (Test-Path -LiteralPath $VenvPython)) { return $false }
    if (-not (Test-NewEnough (Get-PythonVersion @($VenvPython)))) { return $false }
    $made = Get-Content -LiteralPath (Join-Path $Venv 'pyvenv.cfg') | Where-Object { $_ -like 'command = *' }
    return (-not $made -or ([string] $made).EndsWith($Venv, [StringComparison]::OrdinalIgnoreCase))
}

function New-Venv {
    if (Test-Venv) { return }
    $command = @(Find-Python)
    $arguments = @($command | Select-Object -Skip 1) + @('-m', 'venv')
    if (Test-Path -LiteralPath $Venv) {
        Write-Host 'The folder .venv does not work any more (Python was replaced, or the folder was moved).'
        Write-Host 'It is made anew.'
        $arguments += '--clear'
    }
    if ((Invoke-Program $command[0] ($arguments + $Venv)) -ne 0) {
        Stop-Setup 1 @('The folder .venv could not be made; Python says above why.')
    }
}

function Install-Packages([string[]] $Packages) {
    $arguments = @('-m', 'pip', 'install', '--disable-pip-version-check', '--no-input')
    $arguments += @('--constraint', $Constraints) + $Packages
    if ((Invoke-Program $VenvPython $arguments) -ne 0) {
        Stop-Setup 1 @(
            'Installing the packages failed; pip says above why.',
            'No network or a full disk: mend that and run this again, it goes on where it stopped.',
            'No matching version: this Python may be too new for PyTorch; install an older one of 3.11 or',
            'newer, remove .venv, set PYTHON to it and run this again.'
        )
    }
}

function Write-TorchNote {
    $gpu = $null -ne (Get-Command 'nvidia-smi' -ErrorAction SilentlyContinue)
    if ($env:DLLM_TORCH_INDEX_URL) {
        Write-Host 'PyTorch: the build that DLLM_TORCH_INDEX_URL offers.'
    } elseif ($gpu) {
        Write-Host 'PyTorch: the build for CPUs. An NVIDIA graphics card was found; to use it, remove .venv,'
        Write-Host 'set DLLM_TORCH_INDEX_URL (see the top of this script) and run this again.'
    } else {
        Write-Host 'PyTorch: the build for CPUs.'
    }
}

function Install-Package([string] $Extras) {
    $native = Get-ChildItem -Path (Join-Path $Root 'distributed_llm/worker/model/kernels/native/*') `
        -Include '*.c', '*.h'
    $hashes = foreach ($file in @((Join-Path $Root 'pyproject.toml'), (Join-Path $Root 'setup.py'), $Constraints) +
        $native.FullName) {
        (Get-FileHash -LiteralPath $file -Algorithm SHA256).Hash
    }
    $fingerprint = $hashes -join ' '
    if ((Test-Path -LiteralPath $Stamp) -and (Test-Venv)) {
        $installed = (Get-Content -LiteralPath $Stamp -TotalCount 1)
        if (@("dev $fingerprint", "$Extras $fingerprint") -contains $installed) { return }
    }
    New-Venv
    # PyTorch first and by itself: it is by far the largest, and the only one with several builds.
    Write-TorchNote
    $torch = @('torch')
    if ($env:DLLM_TORCH_INDEX_URL) { $torch = @('--extra-index-url', $env:DLLM_TORCH_INDEX_URL, 'torch') }
    Install-Packages $torch
    $target = $Root
    if ($Extras -eq 'dev') { $target = "${Root}[dev]" }
    Install-Packages @('--editable', $target)
    if (-not $DryRun) {
        Set-Content -LiteralPath $Stamp -Value "$Extras $fingerprint" -Encoding Ascii
        Write-Host "Installed into $Venv."
    }
}

function Write-Config {
    if (Test-Path -LiteralPath $Config) { return }
    $arguments = @('-m', 'distributed_llm.common.config_template', $Config)
    if ($Coordinator) { $arguments += @('--set', "worker.coordinator=$Coordinator") }
    if ($Name) { $arguments += @('--set', "worker.name=$Name") }
    if ($Model) { $arguments += @('--set', "$Role.model=$Model") }
    if ($Bind) { $arguments += @('--set', "coordinator.bind=$Bind") }
    $code = Invoke-Program $VenvPython $arguments
    if ($code -ne 0) { exit $code }
}

# Have the coordinator know this machine; a dry run prints no secret.
function Add-Machine {
    if (-not $JoinLine) { return }
    $line = $JoinLine
    if ($DryRun) { $line = "dllm://$Coordinator/..." }
    $arguments = @('join', $line, '--enrol-only')
    if ($Name) { $arguments += @('--name', $Name) }
    $code = Invoke-Program $Dllm $arguments
    if ($code -ne 0) { exit $code }
}

# What the role runs; what was given here goes before config\local.yaml.
function Get-RoleCommand {
    switch ($Role) {
        'test' { return @($VenvPython, '-m', 'pytest', '-n', '2') + $Passed }
        'coordinator' {
            $command = @($Dllm, 'coordinator')
            if ($Model) { $command += $Model }
            $command += @('--config', $Config)
            if ($Bind) { $command += @('--bind', $Bind) }
            return $command + $Passed
        }
        'worker' {
            $command = @($Dllm, 'worker', '--config', $Config)
            if ($Coordinator) { $command += @('--coordinator', $Coordinator) }
            if ($Name) { $command += @('--name', $Name) }
            if ($Model) { $command += @('--model', $Model) }
            if ($Service) { $command += '--wait' }
            return $command + $Passed
        }
        default { return @($Dllm, $Role) + $Passed }
    }
}

function Install-RoleService([string[]] $Command) {
    $arguments = @('service', 'install') + @($Command | Select-Object -Skip 1)
    $code = Invoke-Program $Dllm $arguments
    if ($code -ne 0) { exit $code }
    if (-not $DryRun) { Write-Command }
}

# What to type from now on.
function Write-Command {
    Write-Host "The command is $Dllm; see: & '$Dllm' --help"
    Write-Host "To have it as dllm in this window: `$env:PATH = '$(Split-Path -Parent $Dllm);' + `$env:PATH"
}

# Removing a service needs Python alone, so it works though .venv is gone.
function Uninstall-RoleService {
    $command = @($VenvPython)
    if (-not (Test-Venv)) { $command = @(Find-Python) }
    $env:PYTHONPATH = $Root
    $arguments = @($command | Select-Object -Skip 1)
    $arguments += @('-m', 'distributed_llm.services', 'remove', $Role)
    $code = Invoke-Program $command[0] $arguments
    if ($code -ne 0) { exit $code }
}

$given = @($args)
$option = '' # the word before, if it was passed on: this may be its value
for ($at = 0; $at -lt $given.Count; $at++) {
    $word = [string] $given[$at]
    $value = ''
    if ($word -match '^(--[a-z-]+)=(.*)$') {
        $word = $Matches[1]
        $value = $Matches[2]
    } elseif (@('--coordinator', '--name', '--model', '--bind') -ccontains $word) {
        $at++
        if ($at -lt $given.Count) { $value = [string] $given[$at] }
    }
    if (@('--coordinator', '--name', '--model', '--bind') -ccontains $word -and $value -notmatch '^[^-]') {
        Stop-Setup 2 @("$word needs a value. See --help.")
    }
    switch -CaseSensitive ($word) {
        { @('--help', '-h') -ccontains $_ } { Write-Host $Usage; exit 0 }
        '--dry-run' { $DryRun = $true }
        '--service' { $Service = 'install' }
        '--uninstall-service' { $Service = 'uninstall' }
        '--coordinator' { $Coordinator = $value }
        '--name' { $Name = $value }
        '--model' { $Model = $value }
        '--bind' { $Bind = $value }
        default {
            $isRole = @('demo', 'test', 'coordinator', 'worker') -ccontains $word
            if ($Role) {
                if ($isRole -and -not $option) {
                    Stop-Setup 2 @("Two roles were given, $Role and $word. Choose one.")
                }
                $Passed += $word
                if ($value) { $Passed += $value }
                $option = ''
                if ($word.StartsWith('-') -and -not $value) { $option = $word }
            } elseif ($isRole) {
                $Role = $word
            } elseif ($word.StartsWith('-')) {
                Stop-Setup 2 @("Unknown option $word. Options of dllm follow the role. See --help.")
            } else {
                Stop-Setup 2 @("Unknown role $word. Choose demo, test, coordinator or worker, or none.")
            }
        }
    }
}

if ($Role -ne 'worker' -and ($Coordinator -or $Name)) {
    Stop-Setup 2 @('--coordinator and --name belong to the role worker.')
}
if ($Role -ne 'coordinator' -and $Bind) {
    Stop-Setup 2 @('--bind belongs to the role coordinator.')
}
if (@('coordinator', 'worker') -notcontains $Role -and $Model) {
    Stop-Setup 2 @('--model belongs to the roles coordinator and worker.')
}
if ($Service -and @('worker', 'coordinator') -notcontains $Role) {
    Stop-Setup 2 @('--service and --uninstall-service belong to the roles worker and coordinator.')
}
if ($Role -eq 'worker' -and $Service -ne 'uninstall' -and -not $Coordinator -and -not (Test-Path -LiteralPath $Config)) {
    if ([Console]::IsInputRedirected -or $DryRun) {
        Stop-Setup 2 @('A worker must know whom to join: add --coordinator dllm://...')
    }
    $Coordinator = Read-Host 'What dllm token create printed (dllm://...)'
}
if ($Coordinator -cmatch '^dllm://(.+)/[A-Za-z0-9_-]{43}\.[A-Za-z0-9_-]{43}$') {
    $JoinLine = $Coordinator
    $Coordinator = $Matches[1]
} elseif ($Coordinator -clike 'dllm:*') {
    Stop-Setup 2 @('This is not all of the line that dllm token create prints; copy all of it.')
}
foreach ($address in @($Coordinator, $Bind)) {
    if ($address -and $address -notmatch '^([A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}$') {
        Stop-Setup 2 @("$address is no address. Write HOST:PORT, such as 192.168.1.100:5555.")
    }
}
if ($Name -and $Name -notmatch '^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$') {
    Stop-Setup 2 @("The name $Name will not do. Use up to 64 letters, digits, '.', '_' and '-'.")
}

if ($Service -eq 'uninstall') {
    Uninstall-RoleService
    exit 0
}
Set-Location -LiteralPath $Root
if (@('coordinator', 'worker') -contains $Role) {
    Install-Package 'run'
    Write-Config
    Add-Machine
} elseif ($Role -eq 'demo') {
    Install-Package 'run'
} else {
    Install-Package 'dev'
}
if (-not $Role) {
    if (-not $DryRun) { Write-Command }
    exit 0
}
$command = @(Get-RoleCommand)
if ($Service -eq 'install') {
    Install-RoleService $command
    exit 0
}
$program = $command[0]
$rest = @($command | Select-Object -Skip 1)
if ($DryRun) { exit (Invoke-Program $program $rest) }
& $program @rest
exit $LASTEXITCODE
