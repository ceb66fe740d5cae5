-- The health of a CGDRun (cgd.dev/v1alpha1) for Argo CD, from the conditions that the operator writes.
-- In argo-cd's own tree: resource_customizations/cgd.dev/CGDRun/health.lua; in an installation: kubectl apply --server-side -k examples/gitops/argocd

local status = obj.status or {}

if (status.observedGeneration or 0) ~= obj.metadata.generation then
  return { status = "Progressing", message = "waits for cgd-operator to look at it" }
end

local conditions = {}
for _, condition in ipairs(status.conditions or {}) do
  conditions[condition.type] = condition
end

local function is(type)
  return conditions[type] ~= nil and conditions[type].status == "True"
end

local function told(type, otherwise)
  local message = conditions[type].message
  if message ~= nil and message ~= "" then
    return message
  end
  return otherwise
end

if is("Succeeded") then
  return { status = "Healthy", message = told("Succeeded", "every stage has succeeded") }
end
if is("Stalled") then
  return { status = "Degraded", message = told("Stalled", "the run has stalled") }
end
if is("Suspended") then
  return { status = "Suspended", message = told("Ready", "the run is suspended") }
end

local message = status.state or ""
if status.progress ~= nil then
  message = message .. " " .. status.progress
end
if status.eta ~= nil then
  message = message .. ", " .. status.eta .. " left"
end
if is("Reconciling") then
  message = message .. ": " .. told("Reconciling", "")
end
return { status = "Progressing", message = message }
